"use strict";
// An uploaded drawing or photo: made upright and small in the browser, so that a photo of a telephone is a quick upload.
const REFERENCE_SIDE = 1024; // pixels of the longer side

class Reference {
  constructor() { this.blob = null; }

  async take(file) { // rejects for a file that is no image
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, REFERENCE_SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    this.blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  forget() { this.blob = null; }

  dataUrl() {
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(this.blob);
    });
  }
}
