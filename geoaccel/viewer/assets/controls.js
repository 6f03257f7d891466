"use strict";
// Mouse, touch, keys, buttons, and files that are saved.
for (const id of ["cut", "edge", "size", "mix", "colour", "frusta", "photographs", "show"]) $(id).addEventListener("input", draw);
addEventListener("resize", draw);

const fingers = new Map();
let travelled = 0;
canvas.addEventListener("contextmenu", (event) => event.preventDefault());
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, event);
  travelled = 0;
});
canvas.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
  const apart = () => {
    const [a, b] = [...fingers.values()];
    return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
  };
  travelled += Math.abs(dx) + Math.abs(dy);
  const two = fingers.size === 2, was = two ? apart() : 0;
  fingers.set(event.pointerId, event);
  if (two) zoom(was / Math.max(1, apart()));
  else if (event.buttons & 2 || event.shiftKey) shift(dx / canvas.clientHeight, dy / canvas.clientHeight);
  else turn((dx * 4) / canvas.clientHeight, (dy * 4) / canvas.clientHeight);
});
for (const name of ["pointerup", "pointercancel"])
  canvas.addEventListener(name, (event) => {
    fingers.delete(event.pointerId);
    if (name === "pointerup" && travelled < 4 && event.button === 0) {
      const index = $("frusta").checked ? cameraAt(event.clientX, event.clientY) : -1;
      if (index >= 0) flyTo(index);
    }
  });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(event.deltaY / 600));
}, { passive: false });

const KEYS = {
  ArrowLeft: () => turn(-0.1, 0), ArrowRight: () => turn(0.1, 0), ArrowUp: () => turn(0, -0.1), ArrowDown: () => turn(0, 0.1),
  "+": () => zoom(0.9), "=": () => zoom(0.9), "-": () => zoom(1 / 0.9),
  n: () => flyTo(current + 1), p: () => flyTo(current < 0 ? -1 : current - 1), h: () => fly(home),
};
const MOVES = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, -0.05], ArrowDown: [0, 0.05] };
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const act = event.shiftKey && MOVES[event.key] ? () => shift(...MOVES[event.key]) : KEYS[event.key] || KEYS[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});

scene.cameras.forEach((camera, i) => {
  const button = document.createElement("button");
  button.setAttribute("aria-label", `fly to ${camera.name}`);
  button.title = camera.name;
  if (camera.photograph) {
    const picture = new Image();
    Object.assign(picture, { src: camera.photograph, alt: "" });
    button.append(picture);
  } else button.textContent = camera.name;
  button.addEventListener("click", () => flyTo(i));
  $("strip").append(button);
});
if (innerWidth < 640) $("panel").open = false;
$("strip").hidden = scene.cameras.length === 0;
$("home").addEventListener("click", () => fly(home));

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

$("screenshot").addEventListener("click", () => canvas.toBlob((blob) => save(blob, "view.png")));

// What is shown, as PLY.
function ply() {
  const found = [...shown()], head =
    `ply\nformat binary_little_endian 1.0\ncomment unit: ${scene.unit}\nelement vertex ${found.length}\n` +
    ["x", "y", "z"].map((name) => `property float ${name}\n`).join("") +
    ["red", "green", "blue"].map((name) => `property uchar ${name}\n`).join("") + "end_header\n";
  const data = new DataView(new ArrayBuffer(15 * found.length));
  found.forEach(([result, i], row) => {
    for (let k = 0; k < 3; k++) {
      data.setFloat32(15 * row + 4 * k, result.low[k] + result.step[k] * result.points[3 * i + k], true);
      data.setUint8(15 * row + 12 + k, result.colors[3 * i + k]);
    }
  });
  return new Blob([head, data]);
}

$("export").addEventListener("click", () => save(ply(), "points.ply"));
draw();
