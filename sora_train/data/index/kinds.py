"""What a file is by the extension of its name: a video, an image, or neither."""

VIDEO_SUFFIXES = frozenset({"mp4", "m4v", "mkv", "webm", "mov", "avi"})
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
# A GIF is decoded as a video, however many frames it has.
FURTHER_VIDEO_SUFFIXES = frozenset(
    {"3g2", "3gp", "asf", "dv", "f4v", "flv", "gif", "h264", "h265", "hevc", "ivf", "m1v",
     "m2ts", "m2v", "mk3d", "mpe", "mpeg", "mpg", "mts", "mxf", "ogm", "ogv", "qt", "rm",
     "rmvb", "ts", "vob", "wmv", "y4m"}
)  # fmt: skip
FURTHER_IMAGE_SUFFIXES = frozenset(
    {"apng", "avif", "bmp", "heic", "heif", "j2k", "jfif", "jp2", "jpe", "jxl", "pgm",
     "ppm", "qoi", "tga", "tif", "tiff"}
)  # fmt: skip


def suffix_of(name: str) -> str:
    """The extension of a file's name in lower case, without the dot; '' where it has none."""
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() if dot else ""


def media_kind(name: str) -> str:
    """`video`, `image` or '' by the name's extension."""
    suffix = suffix_of(name)
    if suffix in VIDEO_SUFFIXES | FURTHER_VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix in IMAGE_SUFFIXES | FURTHER_IMAGE_SUFFIXES else ""


def is_further(name: str) -> bool:
    """Whether the extension is a rarer one, which in a tar may be that of a preview beside the clip."""
    return suffix_of(name) in FURTHER_VIDEO_SUFFIXES | FURTHER_IMAGE_SUFFIXES
