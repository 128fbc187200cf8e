"""A child process that renders and encodes scenes of the shapes world, beside the one that decodes."""

from sora_train.data.decode.worker import serve
from sora_train.data.index.shapes_encode import ShapesRequest, encode_scene
from sora_train.data.shapes.world import sample_scene


def answer(request: ShapesRequest) -> tuple[str, object]:
    """('ok', list of EncodedScene), or ('bad', (reason, detail)) with the error in words."""
    numbers = range(request.first, request.first + request.count)
    try:
        scenes = (
            sample_scene(
                request.seed,
                number,
                request.split,
                image_share=request.image_share,
                colour=request.colour,
                lasting=request.lasting,
            )
            for number in numbers
        )
        return "ok", [encode_scene(scene) for scene in scenes]
    # The parent reports the error; of a dead child it would know none.
    except Exception as error:
        return "bad", ("render_failed", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    serve(answer)
