// A picture with a map over its patches.
"use strict";
(() => {
  const { h } = View;
  let opacity = 0.85;
  const drawn = new Set();

  // Paint values (by patch index of one time slot) onto a canvas of one pixel a patch.
  View.paint = (canvas, grid, cells, most) => {
    const [height, width] = grid.slice(-2);
    canvas.width = width;
    canvas.height = height;
    const ink = canvas.getContext("2d");
    ink.clearRect(0, 0, width, height);
    cells.forEach(([index, value]) => {
      const x = Math.sqrt(Math.max(0, value) / (most || 1));
      if (x <= 0) return;
      ink.fillStyle = View.colour.css(x, 0.2 + 0.75 * x);
      ink.fillRect(index % width, Math.floor(index / width), 1, 1);
    });
  };

  // An image that says so when its file is away.
  View.image = (src, alt, lazy = true) => {
    const image = h("img", { alt, loading: lazy ? "lazy" : null, decoding: "async", draggable: "false" });
    image.addEventListener("load", () => { if (image.naturalWidth <= 64) image.classList.add("pixels"); });
    image.addEventListener("error", () => { image.hidden = true; });
    image.src = src;
    return image;
  };

  // Card of one item for one latent: [position, label, value, token, tokens, values].
  View.card = (d, latent, entry, labels, rank) => {
    const [position, label, value, token, tokens, values] = entry;
    const dictionary = View.site.dictionaries[d];
    const grid = dictionary.grid;
    const name = label >= 0 ? labels[label] : `item ${position}`;
    const frame = h("div.frame");
    const place = View.place(dictionary, token);
    if (!View.site.noPictures) frame.append(View.image(View.thumb(position), ""));
    if (grid.length > 1 && dictionary.first.patch) {
      const [first, end] = dictionary.first.patch;
      const slot = grid.slice(-2).reduce((a, b) => a * b, 1);
      const at = place.time || 0;
      const cells = tokens.map((t, i) => [t - first - at * slot, values[i]])
        .filter(([i], n) => i >= 0 && i < slot && tokens[n] < end);
      const canvas = h("canvas.heat", { "aria-hidden": "true" });
      View.paint(canvas, grid, cells, value);
      canvas.style.opacity = String(opacity);
      drawn.add(new WeakRef(canvas));
      frame.append(canvas);
    }
    if (place.kind !== "patch") frame.append(h("span.badge", null, place.kind.toUpperCase()));
    const words = `${name}, ${View.format.number(value)} at ${View.placeName(dictionary, token)}`;
    return h("a.card", { href: View.route.item(position, { d, latent, token }), title: words,
      "aria-label": `${rank ? `${rank}: ` : ""}${words}` },
    frame, h("span.card-line", null, h("span.card-label", null, name), h("span.num", null, View.format.number(value))));
  };

  // How strongly maps cover pictures.
  View.opacityControl = () => {
    const set = (event) => {
      opacity = Number(event.target.value);
      for (const ref of drawn) {
        const canvas = ref.deref();
        if (canvas) canvas.style.opacity = String(opacity);
        else drawn.delete(ref);
      }
    };
    return h("label.range", null, "Map", h("input", { type: "range", min: 0, max: 1, step: 0.05, value: opacity, oninput: set }));
  };
})();
