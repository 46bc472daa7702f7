"use strict";
// A zip archive of files that are compressed already (method "stored"): PKWARE's APPNOTE, sections 4.3.7, 4.3.12, 4.3.16.
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

function littleEndian(fields) { // [[bytes, value], ...]
  const out = new Uint8Array(fields.reduce((sum, [size]) => sum + size, 0));
  let at = 0;
  for (const [size, value] of fields) for (let i = 0; i < size; i++) out[at++] = (value >>> (8 * i)) & 0xff;
  return out;
}

function zipOf(files) { // [{name, bytes}] -> Blob
  const parts = [], directory = [];
  let offset = 0, directorySize = 0;
  for (const { name, bytes } of files) {
    const title = new TextEncoder().encode(name), crc = crc32(bytes);
    const shared = [[2, 0x0800], [2, 0], [2, 0], [2, 0x21], [4, crc], [4, bytes.length], [4, bytes.length], [2, title.length], [2, 0]];
    const local = littleEndian([[4, 0x04034b50], [2, 20], ...shared]);
    const central = littleEndian([[4, 0x02014b50], [2, 20], [2, 20], ...shared, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]]);
    parts.push(local, title, bytes);
    directory.push(central, title);
    offset += local.length + title.length + bytes.length;
    directorySize += central.length + title.length;
  }
  const end = littleEndian([[4, 0x06054b50], [2, 0], [2, 0], [2, files.length], [2, files.length], [4, directorySize], [4, offset], [2, 0]]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
