"use strict";
// The page: what the controls say is drawn at once.
const $ = (id) => document.getElementById(id);
const FOV = (50 * Math.PI) / 180;
const BYTES = 11; // of a point: three places of 16 bits, three colours, rank, jump

function decoded(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes.buffer;
}

function read() {
  const scene = JSON.parse($("facts").textContent);
  scene.results.forEach((result, i) => {
    const data = decoded($(`points-${i}`).textContent), n = result.count;
    if (data.byteLength !== BYTES * n) throw new Error("the file is cut off; write it again");
    result.points = new Uint16Array(data, 0, 3 * n);
    result.colors = new Uint8Array(data, 6 * n, 3 * n);
    result.rank = new Uint8Array(data, 9 * n, n);
    result.jump = new Uint8Array(data, 10 * n, n);
  });
  return scene;
}

const scene = read();
const canvas = $("canvas");
const home = { eye: scene.home.eye, target: scene.home.target, up: scene.up };
const radius = scene.radius;
let now = { ...home }, inside = null, flight = 0, current = -1;

let painter;
try {
  painter = new Painter(canvas, scene);
} catch (error) {
  $("count").textContent = error.message;
  throw error;
}

const both = scene.results.length > 1;
const ways = both ? ["side by side", "blended", ...scene.results.map((result) => result.name)] : [scene.results[0].name];
$("title").textContent = document.title = scene.title;
for (const way of ways) $("show").add(new Option(way));
$("show-row").hidden = !both;
const rated = scene.results.some((result) => result.rated);
for (const row of document.querySelectorAll(".rated")) row.hidden = !rated;
$("unrated").hidden = rated;
$("cut").value = Math.round(Math.max(...scene.results.map((result) => result.cut)));

const shownBy = {
  cut: (v) => `${v} %`, edge: (v) => (v >= 50 ? "none" : `${v} %`), size: (v) => v, mix: (v) => `${v} %`,
};
const settings = () => ({
  cut: rated ? $("cut").value / 100 : 0,
  edge: $("edge").value >= 50 ? 2 : $("edge").value / 50,
  size: ($("size").value * radius) / 2000 / Math.tan(FOV / 2),
  byRank: $("colour").value === "confidence",
  frusta: $("frusta").checked,
  photographs: $("photographs").checked,
  inside,
});

// Which results are drawn where: in one pane or in two.
function panes() {
  const way = $("show").value, [first, second] = scene.results, all = { share: 2, rest: false };
  if (way === "side by side") {
    const half = Math.floor(canvas.width / 2);
    return [
      { x: 0, width: half, name: first.name, results: [{ result: first, ...all }] },
      { x: half, width: canvas.width - half, name: second.name, results: [{ result: second, ...all }] },
    ];
  }
  const share = $("mix").value / 100;
  const results = way === "blended"
    ? [{ result: first, share, rest: true }, { result: second, share, rest: false }]
    : [{ result: scene.results.find((result) => result.name === way), ...all }];
  return [{ x: 0, width: canvas.width, name: both ? way : "", results }];
}

const matrixOf = (aspect) => times(perspective(FOV, aspect, radius / 500, radius * 60), looking(now.eye, now.target, now.up));

let asked = false;
function draw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const parts = panes();
    painter.draw(parts, matrixOf, settings());
    $("names").replaceChildren(...parts.filter((pane) => pane.name).map((pane) => {
      const label = document.createElement("span");
      label.textContent = pane.name;
      label.style.left = `${pane.x / ratio + 10}px`;
      return label;
    }));
    for (const [id, words] of Object.entries(shownBy)) $(id).parentElement.querySelector("output").textContent = words($(id).value);
    $("mix-row").hidden = $("show").value !== "blended";
    count();
    document.body.dataset.drawn = String(Number(document.body.dataset.drawn || 0) + 1);
  });
}
painter.onready = draw;

// The points that are shown, one after the other; the same rules as on the graphics card.
function* shown() {
  const { cut, edge } = settings();
  for (const { result, share, rest } of panes().flatMap((pane) => pane.results))
    for (let i = 0; i < result.count; i++) {
      if (result.rank[i] / 255 < cut || result.jump[i] / 255 > edge) continue;
      if (share <= 1 && (Math.imul(i, 2654435769) >>> 8) / 16777216 < share === rest) continue;
      yield [result, i];
    }
}

let counting = 0;
function count() {
  clearTimeout(counting);
  counting = setTimeout(() => {
    let number = 0;
    for (const _ of shown()) number++;
    $("count").textContent = `${number.toLocaleString("en")} points, ${scene.cameras.length} cameras; unit: ${scene.unit}`;
  }, 150);
}

function fly(to, camera = null) {
  const from = { ...now }, began = performance.now();
  const takes = matchMedia("(prefers-reduced-motion: reduce)").matches ? 1 : 450;
  const mine = ++flight;
  inside = null;
  const step = () => {
    if (mine !== flight) return;
    const t = Math.min(1, (performance.now() - began) / takes), s = t * t * (3 - 2 * t);
    now = { eye: mixed(from.eye, to.eye, s), target: mixed(from.target, to.target, s), up: unit(mixed(from.up, to.up, s)) };
    if (t < 1) requestAnimationFrame(step);
    else inside = camera;
    draw();
  };
  step();
}

function flyTo(index) {
  const number = scene.cameras.length;
  if (!number) return;
  current = (index + number) % number;
  const camera = scene.cameras[current];
  scene.cameras.forEach((one) => (one.current = one === camera));
  [...$("strip").children].forEach((button, i) => button.setAttribute("aria-current", String(i === current)));
  $("strip").children[current].scrollIntoView({ block: "nearest", inline: "nearest" });
  fly({ eye: camera.eye, target: plus(camera.eye, camera.forward, radius), up: camera.up }, camera);
}

function moved(change) {
  flight++;
  inside = null;
  change();
  draw();
}

function turn(across, down) {
  moved(() => {
    let arm = turned(minus(now.eye, now.target), now.up, -across);
    const right = unit(cross(now.up, arm));
    const lifted = turned(arm, right, -down);
    if (Math.abs(dot(unit(lifted), now.up)) < 0.995) arm = lifted;
    now.eye = plus(now.target, arm);
  });
}

function shift(across, down) {
  moved(() => {
    const arm = minus(now.eye, now.target), right = unit(cross(now.up, arm)), above = unit(cross(arm, right));
    const step = plus(right.map((x) => -x * across * length(arm)), above, down * length(arm));
    now.eye = plus(now.eye, step);
    now.target = plus(now.target, step);
  });
}

const zoom = (factor) => moved(() => (now.eye = plus(now.target, minus(now.eye, now.target), factor)));

// The nearest camera whose picture is under a point of the screen.
function cameraAt(x, y) {
  const ratio = canvas.width / canvas.clientWidth, px = x * ratio, py = y * ratio;
  const pane = panes().find((one) => px >= one.x && px < one.x + one.width);
  const matrix = matrixOf(pane.width / canvas.height);
  let best = -1, nearest = Infinity;
  scene.cameras.forEach((camera, i) => {
    const quad = camera.corners.map((corner) => onScreen(matrix, corner, pane.width, canvas.height));
    const away = length(minus(camera.eye, now.eye));
    if (camera === inside || quad.includes(null) || away >= nearest) return;
    const sides = quad.map(([ax, ay], k) => {
      const [bx, by] = quad[(k + 1) % 4];
      return (bx - ax) * (py - ay) - (by - ay) * (px - pane.x - ax);
    });
    if (sides.every((side) => side >= 0) || sides.every((side) => side <= 0)) [best, nearest] = [i, away];
  });
  return best;
}
