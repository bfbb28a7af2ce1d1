// An image divided into rows x columns of cells, one of which can be chosen: by a click, or with the arrow keys.
function render({ model, el }) {
  const box = document.createElement("div");
  const image = document.createElement("img");
  const mark = document.createElement("div");
  const hover = document.createElement("div");
  box.className = "pixart-clickable";
  mark.className = "pixart-mark";
  hover.className = "pixart-hover";
  box.tabIndex = 0;
  box.setAttribute("role", "application");
  image.draggable = false;
  box.append(image, hover, mark);
  el.append(box);

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

  function cellAt(event) {
    const [rows, columns] = size();
    const around = image.getBoundingClientRect();
    const within = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    return [
      within((event.clientY - around.top) / around.height, rows),
      within((event.clientX - around.left) / around.width, columns),
    ];
  }

  function choose(cell) {
    model.set("cell", cell);
    model.save_changes();
  }

  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  function moved(event) {
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const [rows, columns] = size();
    const [row, column] = model.get("cell").length ? model.get("cell") : [0, 0];
    choose([
      Math.min(rows - 1, Math.max(0, row + move[0])),
      Math.min(columns - 1, Math.max(0, column + move[1])),
    ]);
  }

  const showMark = () => frameCell(mark, model.get("cell"));
  const showLabel = () => box.setAttribute("aria-label", model.get("label"));
  const showWidth = () => (box.style.width = `${model.get("width")}px`);
  box.addEventListener("click", (event) => choose(cellAt(event)));
  box.addEventListener("mousemove", (event) => frameCell(hover, cellAt(event)));
  box.addEventListener("mouseleave", () => frameCell(hover, []));
  box.addEventListener("keydown", moved);
  const followed = {
    "change:png": showImage,
    "change:cell": showMark,
    "change:rows": showMark,
    "change:columns": showMark,
    "change:label": showLabel,
    "change:width": showWidth,
  };
  for (const [name, act] of Object.entries(followed)) model.on(name, act);
  for (const act of [showImage, showMark, showLabel, showWidth]) act();
  return () => {
    for (const [name, act] of Object.entries(followed)) model.off(name, act);
    if (address) URL.revokeObjectURL(address);
  };
}

export default { render };
