"use strict";
// Draws points, and cameras with their photographs, by WebGL 2. What is left out is decided on the graphics card.
const POINTS_VERTEX = `#version 300 es
in vec3 place; in vec3 colour; in float rank; in float jump;
uniform vec3 low, pace; uniform mat4 matrix;
uniform float size, cut, edge, share; uniform bool byRank, rest;
out vec3 paint;
vec3 ramp(float t) {  // dark blue, teal, yellow
  return clamp(vec3(1.6 * t * t * t - 0.6 * t + 0.25, 0.05 + 0.95 * t, 0.35 + 0.75 * t - 0.95 * t * t), 0.0, 1.0);
}
void main() {
  gl_Position = matrix * vec4(low + pace * place, 1.0);
  gl_PointSize = clamp(size / gl_Position.w, 1.0, 48.0);
  paint = byRank ? ramp(rank) : colour;
  uint code = uint(gl_VertexID) * 2654435769u;
  bool mine = (float(code >> 8) / 16777216.0 < share) != rest;
  if (rank < cut || jump > edge || !mine) gl_Position = vec4(2.0, 2.0, 2.0, 1.0);
}`;
const POINTS_FRAGMENT = `#version 300 es
precision mediump float; in vec3 paint; out vec4 pixel;
void main() { if (length(gl_PointCoord - 0.5) > 0.6) discard; pixel = vec4(paint, 1.0); }`;
const LINES_VERTEX = `#version 300 es
in vec3 place; in vec2 corner; uniform mat4 matrix; out vec2 at;
void main() { gl_Position = matrix * vec4(place, 1.0); at = corner; }`;
const LINES_FRAGMENT = `#version 300 es
precision mediump float; in vec2 at; uniform vec4 paint; uniform sampler2D photograph; out vec4 pixel;
void main() { pixel = paint.a > 0.0 ? paint : texture(photograph, at); }`;

class Painter {
  constructor(canvas, scene) {
    const gl = canvas.getContext("webgl2", { antialias: true, preserveDrawingBuffer: true });
    if (!gl) throw new Error("this browser has no WebGL 2, which the view needs; take a newer one, or switch it on");
    Object.assign(this, { gl, canvas, scene });
    this.points = this.program(POINTS_VERTEX, POINTS_FRAGMENT);
    this.lines = this.program(LINES_VERTEX, LINES_FRAGMENT);
    for (const result of scene.results) result.array = this.upload(result);
    scene.cameras.forEach((camera) => this.prepare(camera));
    gl.enable(gl.DEPTH_TEST);
  }

  program(vertex, fragment) {
    const { gl } = this, program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    const uniforms = {};
    for (let i = 0; i < gl.getProgramParameter(program, gl.ACTIVE_UNIFORMS); i++) {
      const { name } = gl.getActiveUniform(program, i);
      uniforms[name] = gl.getUniformLocation(program, name);
    }
    return { program, uniforms };
  }

  attribute(program, name, data, count, type, normalized) {
    const { gl } = this, where = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(where);
    gl.vertexAttribPointer(where, count, type, normalized, 0, 0);
  }

  upload(result) {
    const { gl } = this, array = gl.createVertexArray(), { program } = this.points;
    gl.bindVertexArray(array);
    this.attribute(program, "place", result.points, 3, gl.UNSIGNED_SHORT, false);
    this.attribute(program, "colour", result.colors, 3, gl.UNSIGNED_BYTE, true);
    this.attribute(program, "rank", result.rank, 1, gl.UNSIGNED_BYTE, true);
    this.attribute(program, "jump", result.jump, 1, gl.UNSIGNED_BYTE, true);
    return array;
  }

  // Eight lines, then the rectangle of the photograph.
  prepare(camera) {
    const { gl } = this, [a, b, c, d] = camera.corners, o = camera.eye;
    const places = [o, a, o, b, o, c, o, d, a, b, b, c, c, d, d, a, a, b, d, c].flat();
    const corners = [...new Array(32).fill(0), 0, 0, 1, 0, 0, 1, 1, 1];
    camera.array = gl.createVertexArray();
    gl.bindVertexArray(camera.array);
    this.attribute(this.lines.program, "place", new Float32Array(places), 3, gl.FLOAT, false);
    this.attribute(this.lines.program, "corner", new Float32Array(corners), 2, gl.FLOAT, false);
    if (!camera.photograph) return;
    const image = new Image();
    image.onload = () => {
      camera.texture = gl.createTexture();
      gl.bindTexture(gl.TEXTURE_2D, camera.texture);
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, image);
      for (const name of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, name, gl.LINEAR);
      for (const name of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, name, gl.CLAMP_TO_EDGE);
      this.onready?.();
    };
    image.src = camera.photograph;
  }

  // panes: [{x, width, results: [{result, share, rest}]}] in pixels of the canvas.
  draw(panes, matrixOf, settings) {
    const { gl, canvas } = this;
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0.063, 0.071, 0.086, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    for (const pane of panes) {
      gl.viewport(pane.x, 0, pane.width, canvas.height);
      const matrix = matrixOf(pane.width / canvas.height);
      this.drawPoints(pane, matrix, settings);
      if (settings.frusta) this.drawCameras(matrix, settings);
    }
  }

  drawPoints(pane, matrix, settings) {
    const { gl } = this, { program, uniforms } = this.points;
    gl.useProgram(program);
    gl.uniformMatrix4fv(uniforms.matrix, false, matrix);
    gl.uniform1f(uniforms.size, settings.size * this.canvas.height);
    gl.uniform1f(uniforms.cut, settings.cut);
    gl.uniform1f(uniforms.edge, settings.edge);
    gl.uniform1i(uniforms.byRank, settings.byRank);
    for (const { result, share, rest } of pane.results) {
      gl.uniform3fv(uniforms.low, result.low);
      gl.uniform3fv(uniforms.pace, result.step);
      gl.uniform1f(uniforms.share, share);
      gl.uniform1i(uniforms.rest, rest);
      gl.bindVertexArray(result.array);
      gl.drawArrays(gl.POINTS, 0, result.count);
    }
  }

  drawCameras(matrix, settings) {
    const { gl } = this, { program, uniforms } = this.lines;
    gl.useProgram(program);
    gl.uniformMatrix4fv(uniforms.matrix, false, matrix);
    for (const camera of this.scene.cameras) {
      if (settings.inside === camera) continue; // its photograph would hide everything
      gl.bindVertexArray(camera.array);
      gl.uniform4fv(uniforms.paint, camera.current ? [1, 0.7, 0.33, 1] : [0.55, 0.66, 0.85, 1]);
      gl.drawArrays(gl.LINES, 0, 16);
      if (!settings.photographs || !camera.texture) continue;
      gl.uniform4fv(uniforms.paint, [0, 0, 0, 0]);
      gl.bindTexture(gl.TEXTURE_2D, camera.texture);
      gl.drawArrays(gl.TRIANGLE_STRIP, 16, 4);
    }
  }
}
