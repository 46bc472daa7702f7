"""The words of the arena's page in English and Chinese; names of metrics and of systems stay as they are.

English is the key: `words("systems")` gives it back where the language is English or the table knows no other.
"""

import locale
import os
from collections.abc import Callable
from typing import Literal

Language = Literal["auto", "zh", "en"]
Words = Callable[[str], str]

CHINESE = {
    "Arena": "系统对比",
    "Summary": "总表",
    "What was compared": "比较了什么",
    "Quality against cost": "质量与成本",
    "Metrics": "指标",
    "Differences": "差异",
    "Choosing the best of n": "从 n 张中选最好的一张",
    "Seconds an image": "每张图的秒数",
    "Where the systems differ most": "系统之间差异最大的提示词",
    "Images of the same prompts": "相同提示词的图像",
    "Nearest training images": "最近的训练图像",
    "Left out": "未计入",
    "prompts": "提示词",
    "images of each prompt": "每条提示词的图像数",
    "seed": "随机种子",
    "real images": "真实图像",
    "judged by": "裁判",
    "chosen by": "挑选者",
    "written": "生成时间",
    "of": "/",
    "the generators' own likelihoods": "生成器自己的似然",
    "system": "系统",
    "from": "来自",
    "weights": "权重",
    "sampling": "采样参数",
    "images": "图像数",
    "metric": "指标",
    "better": "越……越好",
    "by": "测量者",
    "remarks": "备注",
    "higher": "高",
    "lower": "低",
    "neither": "无所谓",
    "value": "数值",
    "gain over random": "比随机选取多",
    "best of": "从几张中选",
    "share": "比例",
    "by the judge": "裁判的指标",
    "likelihood": "似然",
    "median": "中位数",
    "prompt": "提示词",
    "corrupt": "损坏",
    "not {name}": "未做到：{name}",
    "category right": "品类正确",
    "colour right": "颜色正确",
    "colour right, pixels": "颜色正确（按像素）",
    "all that is named right": "文中所提全部正确",
    "best of {n}": "{n} 选 1",
    "Frechet distance": "Frechet 距离",
    "coverage": "覆盖率",
    "diversity of a prompt": "同一提示词的多样性",
    "seconds an image": "每张图秒数",
    "peak memory, MiB": "峰值内存，MiB",
    "parameters, million": "参数量，百万",
    "training hours": "训练小时数",
    "images seen in training": "训练中看过的图像数",
    "Pareto front": "帕累托前沿",
    "Ringed: on the Pareto front, no other system is both better and cheaper. Bars: 95 % intervals over prompts.": (
        "带圈者位于帕累托前沿：没有别的系统既更好又更省。竖线：对提示词的 95 % 区间。"
    ),
    "Not shown, since it is not recorded: {names}.": "未记录、因而未画出：{names}。",
    "Hours: {notes}.": "小时数说明：{notes}。",
    "Bold: the best of the systems. Behind each value its 95 % interval over prompts.": (
        "粗体：各系统中最好者。数值后为对提示词的 95 % 区间。"
    ),
    "Below each value the 95 % interval by bootstrap over prompts; bold: the best of the systems; real images: "
    "what a perfect generator would get.": (
        "数值下方是按提示词自助法得到的 95 % 区间；粗体：各系统中最好者；真实图像：完美生成器会得到的值。"
    ),
    "The later system minus the earlier one, both on the same prompts, so intervals are those of the difference. "
    "Green: better beyond doubt at 95 %; red: worse; grey: the interval holds zero.": (
        "后一系统减前一系统，提示词相同，区间是差值的区间。绿色：95 % 下确定更好；红色：确定更差；灰色：区间含零。"
    ),
    "Width 1 is the mean of all images of a prompt, which a random choice would get; the others are means over choices "
    "among different images of the prompt.": (
        "宽度 1 是一条提示词所有图像的平均，即随机选取的期望；其余是在不同图像间挑选的平均。"
    ),
    "As recorded when they were made, {n} side by side where made here.": (
        "按生成时的记录；在此处生成时每批 {n} 张。"
    ),
    "Left what was generated, right the training image that is nearest to it; the nearest pairs of each system.": (
        "左：生成的图像；右：与之最近的训练图像。每个系统列出最近的几对。"
    ),
    "By {name}, mean of the images of a prompt.": "按 {name}，取一条提示词图像的平均。",
    "{system} wins at {names}": "{system} 胜在 {names}",
    "no system wins at anything beyond doubt": "没有系统在任何一项上确定胜出",
    "A system with drawings is told more than the others are: the outline of a real image of the prompt.": (
        "带线稿的系统得到的信息更多：该提示词真实图像的轮廓。"
    ),
}


def words_of(language: Language) -> Words:
    """The words of a language; auto follows the locale."""
    if language == "auto":
        language = "zh" if _is_chinese_locale() else "en"
    return (lambda text: CHINESE.get(text, text)) if language == "zh" else (lambda text: text)


def _is_chinese_locale() -> bool:
    """By the environment as gettext reads it, else the system's own setting."""
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    name = next((os.environ[n] for n in names if os.environ.get(n)), "") or locale.getlocale()[0] or ""
    return name.lower().startswith(("zh", "chinese"))
