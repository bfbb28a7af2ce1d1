// An image that is painted over with the mouse: the mask is white where it was painted, black elsewhere.
function render({ model, el }) {
  const box = document.createElement("div");
  const image = document.createElement("img");
  const canvas = document.createElement("canvas");
  box.className = "pixart-painter";
  box.append(image, canvas);
  el.append(box);
  box.setAttribute("role", "img");
  image.alt = "";
  image.draggable = false;
  const pen = canvas.getContext("2d");
  let address = null, last = null, own = null;

  const blank = () => model.get("mask").byteLength === 0;

  async function showMask() {
    if (model.get("mask") === own) return; // painted here
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (blank() || !canvas.width) return;
    const mask = await createImageBitmap(new Blob([model.get("mask")], { type: "image/png" }));
    pen.drawImage(mask, 0, 0, canvas.width, canvas.height);
    const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i];
    pen.putImageData(pixels, 0, 0);
  }

  async function showImage() {
    const png = model.get("png");
    box.classList.toggle("pixart-filled", png.byteLength > 0);
    if (address) URL.revokeObjectURL(address);
    address = png.byteLength ? URL.createObjectURL(new Blob([png])) : null;
    if (!address) return;
    image.src = address;
    await image.decode().catch(() => {}); // the next one may be coming
    Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });
    own = null;
    await showMask();
  }

  function place(event) {
    const around = canvas.getBoundingClientRect();
    return [
      ((event.clientX - around.left) / around.width) * canvas.width,
      ((event.clientY - around.top) / around.height) * canvas.height,
    ];
  }

  function paint(event) {
    const to = place(event);
    Object.assign(pen, { lineCap: "round", lineJoin: "round", strokeStyle: "white" });
    pen.lineWidth = (model.get("brush") / 100) * canvas.width;
    pen.beginPath();
    pen.moveTo(...last);
    pen.lineTo(...to);
    pen.stroke();
    last = to;
  }

  function begin(event) {
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    paint(event);
  }

  function end() {
    if (!last) return;
    last = null;
    const sheet = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
    const ink = sheet.getContext("2d");
    ink.fillRect(0, 0, sheet.width, sheet.height);
    ink.drawImage(canvas, 0, 0);
    sheet.toBlob(async (blob) => {
      own = new DataView(await blob.arrayBuffer());
      model.set("mask", own);
      model.save_changes();
    });
  }

  canvas.addEventListener("pointerdown", begin);
  canvas.addEventListener("pointermove", (event) => last && paint(event));
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  const showLabel = () => box.setAttribute("aria-label", model.get("label"));
  const showWidth = () => (box.style.width = `${model.get("width")}px`);
  const followed = { png: showImage, mask: showMask, label: showLabel, width: showWidth };
  for (const [name, act] of Object.entries(followed)) model.on(`change:${name}`, act);
  for (const act of [showLabel, showWidth, showImage]) act();
  return () => {
    for (const [name, act] of Object.entries(followed)) model.off(`change:${name}`, act);
    if (address) URL.revokeObjectURL(address);
  };
}

export default { render };
