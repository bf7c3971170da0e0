// Numbers as text, the same everywhere.
"use strict";
(() => {
  const dash = "–";
  View.format = {
    count: (n) => (Number.isFinite(n) ? n.toLocaleString("en") : dash),
    // 0.0123 -> 1.23 %
    share(x) {
      if (!Number.isFinite(x)) return dash;
      const p = 100 * x;
      if (p === 0) return "0 %";
      return `${p >= 10 ? p.toFixed(1) : p >= 0.1 ? p.toFixed(2) : p >= 0.001 ? p.toFixed(4) : p.toExponential(0)} %`;
    },
    number(x) {
      if (!Number.isFinite(x)) return dash;
      const a = Math.abs(x);
      if (a === 0) return "0";
      if (a >= 1000) return x.toLocaleString("en", { maximumFractionDigits: 0 });
      if (a >= 100) return x.toFixed(0);
      if (a >= 10) return x.toFixed(1);
      if (a >= 0.1) return x.toFixed(2);
      if (a >= 0.001) return x.toFixed(4);
      return x.toExponential(1);
    },
    fixed: (x, n = 2) => (Number.isFinite(x) ? x.toFixed(n) : dash),
    signed: (x, n = 2) => (Number.isFinite(x) ? `${x >= 0 ? "+" : "−"}${Math.abs(x).toFixed(n)}` : dash),
  };

  // The last two parts of a path; any other key as it is.
  View.shortKey = (key) => (/^[a-z]+:\/\/|^\/|^[A-Za-z]:\\/.test(key) ? key.split(/[\\/]/).slice(-2).join("/") : key);

  // Where a token lies: {kind, index, row, column, time} by the site's token order.
  View.place = (dictionary, token) => {
    for (const [kind, [first, end]] of Object.entries(dictionary.first)) {
      if (token < first || token >= end) continue;
      const index = token - first;
      if (kind !== "patch" || dictionary.grid.length < 2) return { kind, index };
      const [height, width] = dictionary.grid.slice(-2);
      return {
        kind, index,
        time: Math.floor(index / (height * width)),
        row: Math.floor(index / width) % height,
        column: index % width,
      };
    }
    return { kind: "token", index: token };
  };
  View.placeName = (dictionary, token) => {
    const p = View.place(dictionary, token);
    if (p.kind !== "patch") {
      const [first, end] = dictionary.first[p.kind] || [0, 0];
      const name = p.kind === "cls" ? "CLS" : p.kind;
      return end - first > 1 ? `${name} ${p.index}` : name;
    }
    if (p.row === undefined) return `patch ${p.index}`;
    const time = dictionary.grid.length > 2 ? `time ${p.time}, ` : "";
    return `${time}row ${p.row}, column ${p.column}`;
  };
})();
