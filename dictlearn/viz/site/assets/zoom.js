// Pan and zoom of an SVG by wheel, drag, pinch and keys: moves its viewBox.
"use strict";
(() => {
  View.Zoom = class {
    constructor(svg, width, height) {
      Object.assign(this, { svg, width, height });
      this.box = { x: 0, y: 0, w: width, h: height };
      this.points = new Map();
      this.apply();
      svg.addEventListener("wheel", (event) => {
        event.preventDefault();
        this.by(Math.exp(event.deltaY * 0.0015), ...this.at(event));
      }, { passive: false });
      svg.addEventListener("pointerdown", (event) => { this.points.set(event.pointerId, event); this.moved = false; });
      svg.addEventListener("pointermove", (event) => this.drag(event));
      for (const name of ["pointerup", "pointercancel", "pointerleave"]) svg.addEventListener(name, (event) => this.points.delete(event.pointerId));
    }

    at(event) {
      const r = this.svg.getBoundingClientRect();
      return [(event.clientX - r.left) / r.width, (event.clientY - r.top) / r.height];
    }

    drag(event) {
      const before = this.points.get(event.pointerId);
      if (!before) return;
      const [x, y] = this.at(event), [px, py] = this.at(before);
      if (Math.hypot(event.clientX - before.clientX, event.clientY - before.clientY) < 3 && !this.moved) return;
      if (!this.moved && this.svg.setPointerCapture) this.svg.setPointerCapture(event.pointerId);
      this.moved = true;
      if (this.points.size === 2) {
        const other = [...this.points.entries()].find(([id]) => id !== event.pointerId)[1];
        const [ox, oy] = this.at(other);
        this.by(Math.hypot(px - ox, py - oy) / Math.max(1e-6, Math.hypot(x - ox, y - oy)), ox, oy);
      } else {
        this.box.x -= (x - px) * this.box.w;
        this.box.y -= (y - py) * this.box.h;
        this.apply();
      }
      this.points.set(event.pointerId, event);
    }

    by(factor, x = 0.5, y = 0.5) {
      const w = Math.min(this.width * 3, Math.max(this.width / 60, this.box.w * factor));
      const scale = w / this.box.w;
      this.box.x += (1 - scale) * this.box.w * x;
      this.box.y += (1 - scale) * this.box.h * y;
      this.box.w = w;
      this.box.h *= scale;
      this.apply();
    }

    pan(dx, dy) {
      this.box.x += dx * this.box.w;
      this.box.y += dy * this.box.h;
      this.apply();
    }

    reset() {
      this.box = { x: 0, y: 0, w: this.width, h: this.height };
      this.apply();
    }

    apply() {
      const { x, y, w, h } = this.box;
      this.svg.setAttribute("viewBox", `${x} ${y} ${w} ${h}`);
    }
  };
})();
