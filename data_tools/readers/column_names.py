"""The one table of column names, in English and Chinese, and how a header is matched with it.

Case, width (full-width letters), white space, separators and quotes do not matter: `Image Path`, `IMAGE_PATH`,
`image-path` and `ｉｍａｇｅＰａｔｈ` are one name. In each tuple the earlier name wins where a list has several.
"""

import re
import unicodedata
from collections.abc import Sequence

KEYS = (
    *("key", "__key__", "img_id", "id", "idx", "uid", "sample_id", "image_id", "item_id", "goods_id"),
    *(
        "product_id",
        "spu_id",
        "sku_id",
        "sku",
        "spu",
        "asin",
        "product_code",
        "item_number",
        "art_no",
        "barcode",
    ),
    *(
        "货号",
        "商品编号",
        "商品编码",
        "商品id",
        "商品货号",
        "产品编号",
        "产品编码",
        "产品id",
        "宝贝id",
        "款号",
        "编号",
    ),
    *("编码", "sku编码", "sku编号", "spu编码", "条码", "条形码", "序号", "图片id", "图片编号"),
)
CAPTIONS = (
    *("caption", "captions", "sentences", "text", "title", "pd_title", "prompt", "txt", "image_caption"),
    *(
        "item_title",
        "goods_title",
        "product_title",
        "item_name",
        "goods_name",
        "product_name",
        "display_name",
        "name",
    ),
    *(
        "标题",
        "商品标题",
        "宝贝标题",
        "产品标题",
        "图片标题",
        "中文标题",
        "名称",
        "商品名称",
        "产品名称",
        "商品名",
    ),
    *(
        "产品名",
        "宝贝名称",
        "品名",
        "图片描述",
        "商品描述",
        "产品描述",
        "描述",
        "文字描述",
        "描述文本",
        "文本",
    ),
    *(
        "文字",
        "文案",
        "说明",
        "图片说明",
        "提示词",
        "description",
        "product_description",
        "desc",
        "label_text",
    ),
)
URLS = (
    *(
        "url",
        "image_url",
        "img_url",
        "image_link",
        "img_link",
        "picture_url",
        "pic_url",
        "photo_url",
        "image_urls",
    ),
    *(
        "main_image_url",
        "image_src",
        "img_src",
        "src",
        "图片链接",
        "图片地址",
        "图片网址",
        "图片url",
        "主图链接",
    ),
    *("主图地址", "主图url", "商品图片链接", "链接", "网址"),
)
PATHS = (
    *("image_path", "filepath", "file_name", "filename", "file_path", "path", "file", "img_path", "img_file"),
    *(
        "image_file",
        "image_name",
        "img_name",
        "image_filename",
        "picture_path",
        "pic_path",
        "photo_path",
        "rel_path",
    ),
    *(
        "relative_path",
        "图片路径",
        "图片文件",
        "图片名",
        "图片名称",
        "图片文件名",
        "文件名",
        "文件路径",
        "文件",
        "路径",
    ),
    *("主图路径", "主图文件"),
)
IMAGES = (
    *(
        "image",
        "img",
        "imgbase64",
        "image_base64",
        "img_base64",
        "image_bytes",
        "jpg",
        "png",
        "webp",
        "photo",
    ),
    *(
        "picture",
        "pic",
        "images",
        "main_image",
        "image_data",
        "base64",
        "图片",
        "图像",
        "主图",
        "商品图片",
        "商品图",
    ),
    *("商品主图", "产品图片", "产品图", "照片", "图"),
)
PHOTOS = ("pd_realistic_drawing", "realistic_drawing", "photo", "target", "image", "file_name")
DRAWINGS = (
    *("pd_line_drawing", "line_drawing", "drawing", "sketch", "lineart", "conditioning_image"),
    *("control_image", "线稿", "线稿图"),
)
_SEPARATORS = re.compile(r"[\W_]+")


def normal(name: str) -> str:
    """The name as it is compared: full-width to half-width, lower case, letters and digits alone."""
    return _SEPARATORS.sub("", unicodedata.normalize("NFKC", name).casefold())


def find_column(names: Sequence[str], known: Sequence[str], chosen: str = "") -> str:
    """The column of `names` that holds a thing: the one the user chose, else the first known; "" if none."""
    if chosen in names and chosen:
        return chosen
    present: dict[str, str] = {}
    for name in names:
        present.setdefault(normal(name), name)
    wanted = (chosen,) if chosen else known
    found = (present.get(normal(name), "") for name in wanted if normal(name))
    return next(filter(None, found), "")


def has_known_columns(names: Sequence[str], image_column: str = "") -> bool:
    """True if a row with these columns says where its image is."""
    return bool(find_column(names, (*URLS, *PATHS, *IMAGES, *PHOTOS, "image_id"), image_column))


def is_line_drawing(names: Sequence[str]) -> bool:
    """True if rows hold a drawing beside the image."""
    drawing = find_column(names, DRAWINGS)
    pair = bool(drawing) and any(find_column(names, (p,)) not in ("", drawing) for p in PHOTOS)
    return pair or {"source", "target"} <= set(map(normal, names))


def is_download_log(names: Sequence[str]) -> bool:
    """True for the table of what img2dataset has fetched, which lies beside the images it names and holds none."""
    seen = set(map(normal, names))
    return {"key", "status", "errormessage", "url"} <= seen and not seen & {"jpg", "png", "webp"}
