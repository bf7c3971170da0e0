// Small charts in SVG, each with its numbers in words for those who cannot see it.
"use strict";
(() => {
  const { h, s } = View;

  // Bars with a button each. bars: [{share, title, on}]; pick(i) when one is pressed.
  View.bars = (label, bars, pick, low, high) => {
    const most = Math.max(1e-9, ...bars.map((b) => b.count));
    const box = h("div.bars", { role: "group", "aria-label": label });
    bars.forEach((bar, i) => {
      const inner = h("span.bars-fill");
      inner.style.height = bar.count ? `${Math.max(3, 100 * Math.sqrt(bar.count / most))}%` : "0";
      box.append(h("button.bars-bar", {
        type: "button", title: bar.title, "aria-label": bar.title,
        "aria-pressed": bar.on ? "true" : "false", disabled: !bar.count, onclick: () => pick(i),
      }, inner));
    });
    return h("figure.mini", null, h("figcaption", null, label), box,
      h("div.bars-ends", null, h("span", null, low), h("span", null, high)));
  };

  // Histogram of a latent's activations over bins of equal ratio.
  View.histogram = (edges, bins, counts) => {
    if (!bins.length) return View.empty("No activations", "This latent is never active in this store.");
    const first = bins[0], last = bins[bins.length - 1], n = last - first + 1;
    const most = Math.max(...counts), W = 320, H = 112, total = counts.reduce((a, b) => a + b, 0);
    const gap = n > 60 ? 0 : 1;
    const marks = bins.map((bin, i) => {
      const height = Math.max(1, (counts[i] / most) * H);
      return s("rect.hist-bar", { x: ((bin - first) / n) * W, y: H - height, width: Math.max(0.5, W / n - gap), height },
        s("title", null, `${View.format.number(edges[bin])} to ${View.format.number(edges[bin + 1])}: ${View.format.count(counts[i])}`));
    });
    const ticks = [0, 0.5, 1].map((x) => View.format.number(edges[first] * (edges[last + 1] / edges[first]) ** x));
    return h("figure.chart", null,
      s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", preserveAspectRatio: "none",
        "aria-label": `Histogram of ${View.format.count(total)} activations from ${ticks[0]} to ${ticks[2]}` }, marks),
      h("div.axis", null, ticks.map((t) => h("span", null, t))),
      h("figcaption", null, "activation, logarithmic"));
  };

  // How often a latent is active at each patch, over all items.
  View.positionMap = (dictionary, tokens, counts, items) => {
    const grid = dictionary.grid;
    if (grid.length < 2 || !dictionary.first.patch) {
      return View.empty("No grid", "The store does not say where its tokens lie.");
    }
    const [height, width] = grid.slice(-2), times = grid.length > 2 ? grid[0] : 1;
    const [first, end] = dictionary.first.patch;
    const sum = new Float64Array(height * width);
    let all = 0;
    tokens.forEach((token, i) => {
      if (token < first || token >= end) return;
      sum[(token - first) % (height * width)] += counts[i];
      all += counts[i];
    });
    const most = Math.max(1, ...sum);
    const canvas = h("canvas.map", { width, height, role: "img",
      "aria-label": `Map of ${View.format.count(all)} activations over ${height} by ${width} patches` });
    const ink = canvas.getContext("2d");
    sum.forEach((v, i) => {
      ink.fillStyle = View.colour.css(v / most);
      ink.fillRect(i % width, Math.floor(i / width), 1, 1);
    });
    const note = h("span.hover-note");
    canvas.style.aspectRatio = `${width} / ${height}`;
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const column = Math.min(width - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * width)));
      const row = Math.min(height - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * height)));
      note.textContent = `· row ${row}, column ${column}: ${View.format.share(sum[row * width + column] / (items * times))}`;
    });
    return h("figure.chart", null, canvas,
      h("figcaption", null, View.colour.legend("0", View.format.share(most / (items * times))), " of items", note));
  };

  // A row of a list with a bar behind: label, value in [0, 1], text.
  View.meter = (label, share, text, href) => {
    const fill = h("span.meter-fill");
    fill.style.width = `${(100 * Math.min(1, Math.max(0, share))).toFixed(1)}%`;
    const inside = [h("span.meter-label", null, label), h("span.meter-track", { "aria-hidden": "true" }, fill), h("span.num", null, text)];
    return href ? h("a.meter", { href }, inside) : h("div.meter", null, inside);
  };
})();
