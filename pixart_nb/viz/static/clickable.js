// An image divided into rows x columns of cells, one of which can be chosen: by a click, or with the arrow keys.
function render({ model, el }) {
  const make = (name, parent, className = "") => {
    const made = document.createElement(name);
    made.className = className;
    parent.append(made);
    return made;
  };
  const box = make("div", el, "pixart-clickable");
  const image = make("img", box);
  const hover = make("div", box, "pixart-hover");
  const mark = make("div", box, "pixart-mark");
  const said = make("span", box, "pixart-said");
  box.tabIndex = 0;
  said.setAttribute("aria-live", "polite");
  image.alt = "";
  image.draggable = false;

  let address = null;
  const size = () => [model.get("rows"), model.get("columns")];

  function showImage() {
    const old = address;
    address = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    image.src = address;
    if (old) URL.revokeObjectURL(old);
  }

  function frameCell(frame, cell) {
    const [rows, columns] = size();
    frame.style.display = cell.length ? "block" : "none";
    if (!cell.length) return;
    frame.style.top = `${(100 * cell[0]) / rows}%`;
    frame.style.left = `${(100 * cell[1]) / columns}%`;
    frame.style.height = `${100 / rows}%`;
    frame.style.width = `${100 / columns}%`;
  }

  function showMark() {
    const cell = model.get("cell");
    frameCell(mark, cell);
    const name = (names, index, kind) => model.get(names)[index] || `${kind} ${index}`;
    said.textContent = cell.length
      ? `${name("row_names", cell[0], "row")}, ${name("column_names", cell[1], "column")}` : "";
  }

  function cellAt(event) {
    const around = image.getBoundingClientRect();
    const within = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    const [rows, columns] = size();
    return [
      within((event.clientY - around.top) / around.height, rows),
      within((event.clientX - around.left) / around.width, columns),
    ];
  }

  // A dialog in the browser's top layer: no frame of the notebook cuts it.
  function showLarge() {
    const dialog = make("dialog", box, "pixart-large");
    const large = make("img", dialog);
    large.src = image.src;
    large.alt = model.get("label");
    large.style.imageRendering = image.style.imageRendering;
    dialog.tabIndex = -1;
    dialog.addEventListener("click", (event) => { event.stopPropagation(); dialog.close(); });
    dialog.addEventListener("close", () => dialog.remove());
    dialog.showModal();
  }

  function choose(cell) {
    if (model.get("zoomable")) return showLarge();
    model.set("cell", cell);
    model.save_changes();
  }

  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Enter: [0, 0], " ": [0, 0] };

  function moved(event) {
    const move = moves[event.key];
    if (!move || (model.get("zoomable") && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    event.stopPropagation();
    const chosen = model.get("cell");
    if (!chosen.length) return choose([0, 0]);
    choose(size().map((count, axis) => Math.min(count - 1, Math.max(0, chosen[axis] + move[axis]))));
  }

  const showLabel = () => box.setAttribute("aria-label", model.get("label"));
  const showWidth = () => (box.style.width = `${model.get("width")}px`);
  box.addEventListener("click", (event) => choose(cellAt(event)));
  box.addEventListener("mousemove", (event) => model.get("zoomable") || frameCell(hover, cellAt(event)));
  box.addEventListener("mouseleave", () => frameCell(hover, []));
  box.addEventListener("keydown", moved);
  const showSmooth = () => {
    image.style.imageRendering = model.get("smooth") ? "auto" : "pixelated";
    box.style.cursor = model.get("zoomable") ? "zoom-in" : "crosshair";
    box.setAttribute("role", model.get("zoomable") ? "button" : "application");
  };
  const followed = { label: showLabel, width: showWidth, png: showImage, smooth: showSmooth, zoomable: showSmooth };
  for (const name of ["cell", "rows", "columns", "row_names", "column_names"]) followed[name] = showMark;
  for (const [name, act] of Object.entries(followed)) model.on(`change:${name}`, act);
  for (const act of [showImage, showMark, showLabel, showWidth, showSmooth]) act();
  return () => {
    for (const [name, act] of Object.entries(followed)) model.off(`change:${name}`, act);
    if (address) URL.revokeObjectURL(address);
  };
}

export default { render };
