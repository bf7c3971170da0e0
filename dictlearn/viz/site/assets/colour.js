// One sequential scale for every map: viridis (van der Walt and Smith 2015), which reads the same
// to colour-blind eyes and in grey.
"use strict";
(() => {
  const STOPS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
    [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
  View.colour = {
    at(x) {
      const place = Math.min(Math.max(x, 0), 1) * (STOPS.length - 1);
      const i = Math.min(Math.floor(place), STOPS.length - 2);
      return STOPS[i].map((v, c) => Math.round(v + (place - i) * (STOPS[i + 1][c] - v)));
    },
    css: (x, alpha = 1) => { const [r, g, b] = View.colour.at(x); return `rgba(${r}, ${g}, ${b}, ${alpha})`; },
    legend(low, high) {
      const bar = View.h("span.scale-bar", { "aria-hidden": "true" });
      bar.style.background = `linear-gradient(90deg, ${STOPS.map((s) => `rgb(${s.join(",")})`).join(",")})`;
      return View.h("span.scale", null, View.h("span", null, low), bar, View.h("span", null, high));
    },
  };
})();
