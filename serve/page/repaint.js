"use strict";
// The viewer: an image enlarged, a brush over it, and the mask that the brush made.

class Viewer {
  constructor(dialog, canvas) {
    this.dialog = dialog;
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.strokes = document.createElement("canvas");
    this.drawing = null;
    canvas.addEventListener("pointerdown", (e) => { canvas.setPointerCapture(e.pointerId); this.drawing = this.point(e); this.stroke(e); });
    canvas.addEventListener("pointermove", (e) => this.drawing && this.stroke(e));
    canvas.addEventListener("pointerup", () => { this.drawing = null; });
    canvas.addEventListener("pointercancel", () => { this.drawing = null; });
  }

  async show(image) {
    this.image = image;
    const picture = await createImageBitmap(image.blob);
    this.picture = picture;
    for (const surface of [this.canvas, this.strokes]) {
      surface.width = picture.width * this.scale();
      surface.height = picture.height * this.scale();
    }
    this.isEmpty = true;
    this.render();
    if (!this.dialog.open) this.dialog.showModal();
    this.canvas.focus();
  }

  scale() { return Math.max(1, Math.round(512 / this.picture.width)); }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * this.canvas.width / box.width, (event.clientY - box.top) * this.canvas.height / box.height];
  }

  stroke(event) {
    const to = this.point(event), pen = this.strokes.getContext("2d");
    pen.strokeStyle = "#fff";
    pen.lineCap = "round";
    pen.lineWidth = 2 * Number(document.getElementById("brush").value);
    pen.beginPath();
    pen.moveTo(...this.drawing);
    pen.lineTo(to[0] + 0.01, to[1]);
    pen.stroke();
    this.drawing = to;
    this.isEmpty = false;
    this.render();
  }

  clear() {
    this.strokes.getContext("2d").clearRect(0, 0, this.strokes.width, this.strokes.height);
    this.isEmpty = true;
    this.render();
  }

  render() {
    this.context.drawImage(this.picture, 0, 0, this.canvas.width, this.canvas.height);
    this.context.globalAlpha = 0.6;
    this.context.drawImage(this.strokes, 0, 0);
    this.context.globalAlpha = 1;
  }

  mask() { // white where it was brushed, on black
    const out = document.createElement("canvas");
    out.width = this.strokes.width;
    out.height = this.strokes.height;
    const context = out.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, out.width, out.height);
    context.drawImage(this.strokes, 0, 0);
    return new Promise((resolve) => out.toBlob(resolve, "image/png"));
  }
}
