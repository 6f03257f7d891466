"use strict";
// Vectors of three numbers, and matrices of sixteen in columns, as WebGL takes them.
const plus = (a, b, t = 1) => [a[0] + t * b[0], a[1] + t * b[1], a[2] + t * b[2]];
const minus = (a, b) => plus(a, b, -1);
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const length = (a) => Math.hypot(...a);
const unit = (a) => a.map((x) => x / (length(a) || 1));
const mixed = (a, b, t) => a.map((x, i) => x + t * (b[i] - x));

function turned(v, axis, angle) {
  const c = Math.cos(angle), s = Math.sin(angle);
  return plus(plus(v.map((x) => x * c), cross(axis, v), s), axis, dot(axis, v) * (1 - c));
}

function times(a, b) {
  const out = new Float32Array(16);
  for (let column = 0; column < 4; column++)
    for (let row = 0; row < 4; row++)
      for (let k = 0; k < 4; k++) out[4 * column + row] += a[4 * k + row] * b[4 * column + k];
  return out;
}

// World to eye: x right, y up, looking along -z.
function looking(eye, target, up) {
  const back = unit(minus(eye, target)), right = unit(cross(up, back)), above = cross(back, right);
  return new Float32Array([
    right[0], above[0], back[0], 0, right[1], above[1], back[1], 0, right[2], above[2], back[2], 0,
    -dot(right, eye), -dot(above, eye), -dot(back, eye), 1,
  ]);
}

function perspective(fov, aspect, near, far) {
  const f = 1 / Math.tan(fov / 2);
  return new Float32Array([f / aspect, 0, 0, 0, 0, f, 0, 0, 0, 0, (far + near) / (near - far), -1, 0, 0, (2 * far * near) / (near - far), 0]);
}

// Pixels of a point on a canvas, from the top left; null behind the eye.
function onScreen(matrix, point, width, height) {
  const at = (row) => matrix[row] * point[0] + matrix[4 + row] * point[1] + matrix[8 + row] * point[2] + matrix[12 + row];
  const w = at(3);
  return w <= 1e-6 ? null : [(0.5 + 0.5 * at(0) / w) * width, (0.5 - 0.5 * at(1) / w) * height];
}
