"use strict";
// Words of the page in both languages, and the texts that the shipped model knows.
const WORDS = {
  zh: {
    title: "商品图生成", prompt: "描述", count: "张数", seed: "种子", guidance: "引导强度", quality: "质量", fast: "快",
    better: "较好", best: "最好", more: "更多", negative: "不要出现", key: "密钥", go: "生成", stop: "停止",
    download: "全部下载", history: "历史", vary: "相似的", repaint: "重画涂抹处", clear: "清除涂抹", brush: "笔宽",
    save: "保存", close: "关闭", brush_hint: "在图上涂抹要重画的部分", random: "随机", other: "English",
    working: "正在生成 …", finished: (n, s) => `${n} 张，用时 ${s} 秒`, stopped: "已停止", nothing: "请先涂抹要重画的部分",
    score: (p) => `优于 ${p}% 的真实图片`, empty: "请输入描述", lost: "连接中断，请重试",
    whiten: "纯白背景", upload: "上传线稿或照片", use: "用作", as_line: "线稿", as_photo: "照片换色", closeness: "贴合度",
    forget: "移除", recolour: "换色", preview: "已上传的图片", api: "接口文档", unreadable: "无法读取这个图片文件",
    recolour_hint: "请先在描述中写上新的颜色", not_white: (n) => `，其中 ${n} 张找不到背景，保持原样`,
    retry: (s) => `队列已满，请 ${s} 秒后再试`, denied: "密钥无效：请在“更多”中填写密钥",
  },
  en: {
    title: "Product images", prompt: "Description", count: "Images", seed: "Seed", guidance: "Guidance", quality: "Quality",
    fast: "fast", better: "better", best: "best", more: "More", negative: "Leave out", key: "Key", go: "Generate",
    stop: "Stop", download: "Download all", history: "History", vary: "Similar ones", repaint: "Repaint the brushed part",
    clear: "Clear the brush", brush: "Brush", save: "Save", close: "Close",
    brush_hint: "Brush over what is to be repainted", random: "random", other: "中文", working: "Generating ...",
    finished: (n, s) => `${n} images in ${s} s`, stopped: "Stopped", nothing: "Brush over a part of the image first",
    score: (p) => `better than ${p} % of real images`, empty: "Please describe an image", lost: "The connection broke: please try again",
    whiten: "White background", upload: "Upload a drawing or photo", use: "Use as", as_line: "line drawing",
    as_photo: "photo to recolour", closeness: "Closeness", forget: "Remove", recolour: "Recolour", preview: "uploaded image",
    api: "API", unreadable: "This image file cannot be read", recolour_hint: "Name the new colour in the description first",
    not_white: (n) => `, ${n} of them left as they are: no background was found`,
    retry: (s) => `The queue is full: please try again in ${s} s`, denied: "Wrong key: please give one under More",
  },
};
const EXAMPLES = ["一件红色的T恤", "一条蓝色牛仔裤", "一双黑色的鞋", "一条碎花连衣裙", "金冠苹果", "一盒牛奶", "香蕉", "胡萝卜"];
