// Elements from descriptions. Strings always become text nodes: nothing from a store is parsed.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";

  const fill = (node, props, children) => {
    for (const [name, value] of Object.entries(props || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
      else if (name === "value") node.value = value;
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
    return node;
  };

  // h("p.note", {title: "x"}, "text")
  View.h = (what, props, ...children) => {
    const [tag, ...classes] = what.split(".");
    const node = document.createElement(tag || "div");
    if (classes.length) node.className = classes.join(" ");
    return fill(node, props, children);
  };
  View.s = (what, props, ...children) => {
    const [tag, ...classes] = what.split(".");
    const node = document.createElementNS(SVG, tag);
    if (classes.length) node.setAttribute("class", classes.join(" "));
    return fill(node, props, children);
  };
  View.say = (text) => { document.getElementById("status").textContent = text; };

  // A panel with a heading; `aside` stands at the right of it.
  View.panel = (title, aside, ...children) => {
    const id = `h-${title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}`;
    return View.h("section.panel", { "aria-labelledby": id },
      View.h("div.panel-head", null, View.h("h2", { id }, title), aside ? View.h("div.aside", null, aside) : null),
      children);
  };
  View.empty = (title, ...text) => View.h("div.empty", null, View.h("p.empty-title", null, title), View.h("p", null, text));
  View.failure = (error, again) => View.h("div.empty.failure", { role: "alert" },
    View.h("p.empty-title", null, "This could not be shown"),
    View.h("p", null, error && error.message ? error.message : String(error)),
    again ? View.h("button.button", { type: "button", onclick: again }, "Try again") : null);
  View.loading = (lines = 3) => View.h("div.loading", { "aria-busy": "true", "aria-label": "Loading" },
    Array.from({ length: lines }, () => View.h("div.bone")));
})();
