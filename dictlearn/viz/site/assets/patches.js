// A picture whose patches can be pointed at: by pointer, by touch, or by the arrow keys.
"use strict";
(() => {
  const { h } = View;

  // options: dictionary, position, frames, token, onmove(token)
  View.Stage = class {
    constructor(options) {
      Object.assign(this, options);
      const grid = this.dictionary.grid;
      this.hasGrid = grid.length > 1 && !!this.dictionary.first.patch;
      [this.height, this.width] = this.hasGrid ? grid.slice(-2) : [1, 1];
      this.times = grid.length > 2 ? grid[0] : 1;
      this.slot = this.height * this.width;
      this.first = this.hasGrid ? this.dictionary.first.patch[0] : 0;
      this.time = 0;
      this.pinned = false;
      this.image = View.site.noPictures ? null : View.image(View.picture(this.position, 0), "", false);
      this.canvas = h("canvas.heat", { "aria-hidden": "true" });
      this.cursor = h("div.cursor", { "aria-hidden": "true" });
      this.cursor.style.width = `${100 / this.width}%`;
      this.cursor.style.height = `${100 / this.height}%`;
      this.frame = h("div.stage", { tabindex: 0, role: "application", "aria-label": "Patches of the picture. Arrows move, Enter pins." },
        this.image, this.canvas, this.hasGrid ? this.cursor : null);
      this.frame.style.aspectRatio = `${this.width} / ${this.height}`;
      if (this.hasGrid) this.listen();
      this.slider = this.times > 1 ? h("input", { type: "range", min: 0, max: this.times - 1, step: 1, value: 0, id: "time",
        oninput: (e) => this.setTime(Number(e.target.value)) }) : null;
      this.clock = h("output.num", { for: "time" });
      this.node = h("div.stage-box", null, this.frame,
        this.slider ? h("label.range.time", null, "Time", this.slider, this.clock) : null);
      this.set(this.token, false);
    }

    listen() {
      const at = (event) => {
        const box = this.frame.getBoundingClientRect();
        const column = Math.floor(((event.clientX - box.left) / box.width) * this.width);
        const row = Math.floor(((event.clientY - box.top) / box.height) * this.height);
        if (row < 0 || column < 0 || row >= this.height || column >= this.width) return null;
        return this.first + this.time * this.slot + row * this.width + column;
      };
      this.frame.addEventListener("pointermove", (event) => {
        const token = at(event);
        if (!this.pinned && token !== null && token !== this.token) this.set(token);
      });
      this.frame.addEventListener("click", (event) => {
        const token = at(event);
        this.pinned = !(this.pinned && token === this.token);
        if (token !== null) this.set(token);
      });
      this.frame.addEventListener("keydown", (event) => {
        const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          this.pinned = !this.pinned;
          this.mark();
          View.say(this.pinned ? "pinned" : "not pinned");
        } else if (event.key in moves && !event.altKey && !event.metaKey && !event.ctrlKey) {
          event.preventDefault();
          event.stopPropagation();
          const [down, right] = moves[event.key];
          const place = Math.max(0, this.token - this.first) % this.slot;
          const row = Math.min(this.height - 1, Math.max(0, Math.floor(place / this.width) + down));
          const column = Math.min(this.width - 1, Math.max(0, (place % this.width) + right));
          this.set(this.first + this.time * this.slot + row * this.width + column);
          View.say(View.placeName(this.dictionary, this.token));
        }
      });
    }

    setTime(time) {
      this.time = time;
      const inside = this.token >= this.first;
      this.showFrame();
      this.set(inside ? this.first + time * this.slot + ((this.token - this.first) % this.slot) : this.token);
    }

    showFrame() {
      if (this.slider) {
        this.slider.value = this.time;
        this.clock.textContent = `${this.time + 1} of ${this.times}`;
      }
      if (this.image && this.frames > 1) {
        const frame = Math.min(this.frames - 1, Math.floor(((this.time + 0.5) * this.frames) / this.times));
        this.image.hidden = false;
        this.image.src = View.picture(this.position, frame);
      }
    }

    set(token, tell = true) {
      this.token = token;
      const place = token - this.first;
      const inside = this.hasGrid && place >= 0 && place < this.slot * this.times;
      if (inside && Math.floor(place / this.slot) !== this.time) {
        this.time = Math.floor(place / this.slot);
        this.showFrame();
      } else if (!tell) this.showFrame();
      this.cursor.hidden = !inside;
      if (inside) {
        this.cursor.style.left = `${(((place % this.slot) % this.width) / this.width) * 100}%`;
        this.cursor.style.top = `${(Math.floor((place % this.slot) / this.width) / this.height) * 100}%`;
      }
      this.mark();
      if (tell) this.onmove(token);
    }

    mark() { this.cursor.classList.toggle("pinned", this.pinned); }

    // Paint values by token; only the time in sight is drawn.
    paint(value) {
      if (!this.hasGrid) return 0;
      let most = 0;
      for (let i = 0; i < this.slot * this.times; i++) most = Math.max(most, value(this.first + i) || 0);
      const cells = Array.from({ length: this.slot }, (_, i) => [i, value(this.first + this.time * this.slot + i) || 0]);
      View.paint(this.canvas, this.dictionary.grid, cells, most || 1);
      return most;
    }
  };
})();
