"""A child process that renders and encodes scenes of the shapes world, beside the one that decodes."""

from sora_train.data.decode.worker import serve
from sora_train.data.index.shapes_encode import ShapesRequest, encode_scene
from sora_train.data.shapes.scene import Scene
from sora_train.data.shapes.world import sample_scene


def scene(request: ShapesRequest, number: int) -> Scene:
    return sample_scene(request.seed, number, request.split, image_share=request.image_share)


def answer(request: ShapesRequest) -> tuple[str, object]:
    """('ok', list of EncodedScene), or ('bad', (reason, detail)) with the error in words."""
    numbers = range(request.first, request.first + request.count)
    try:
        return "ok", [encode_scene(scene(request, n)) for n in numbers]
    # The parent reports it; a dead child could only say that it died.
    except Exception as error:
        return "bad", ("render_failed", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    serve(answer)
