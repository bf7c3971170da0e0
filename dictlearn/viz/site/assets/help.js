// Keyboard: shortcuts that work anywhere, and the sheet that lists them.
"use strict";
(() => {
  const { h } = View;
  const KEYS = [["/", "search latents"], ["↑ ↓", "move in the table, or the patch in a picture"], ["Enter", "open, or pin the patch"],
    ["← →", "previous and next latent"], ["Esc", "clear, or up one page"], ["g then l, i, g", "go to latents, items, graphs"],
    ["+ − 0", "zoom the graph, and reset it"], ["t", "light or dark"], ["?", "this list"]];
  let sheet = null;
  let pending = false;

  View.help = () => {
    if (!sheet) {
      sheet = h("dialog.sheet", { "aria-labelledby": "keys-title" }, h("h2", { id: "keys-title" }, "Keys"),
        h("dl.keys", null, KEYS.map(([key, what]) => [h("dt", null, h("kbd", null, key)), h("dd", null, what)])),
        h("form", { method: "dialog" }, h("button.button", null, "Close")));
      document.body.append(sheet);
    }
    if (!sheet.open) sheet.showModal();
  };

  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input:not([type=range]), select, textarea");
    if (event.key === "Escape") return escape(typing);
    if (typing || (sheet && sheet.open)) return;
    if (pending) {
      pending = false;
      const to = { l: ["d0"], i: ["items"], g: ["graphs"] }[event.key];
      if (to) { event.preventDefault(); View.route.go(View.route.to(to)); }
      return;
    }
    if (event.key === "/") { event.preventDefault(); search(); }
    else if (event.key === "?") View.help();
    else if (event.key === "t") View.theme.toggle();
    else if (event.key === "g") { pending = true; setTimeout(() => { pending = false; }, 1200); }
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      if (event.target.closest("[role=application], [role=grid], input, .bars")) return;
      const link = document.querySelector(`[data-key=${event.key}]`);
      if (link) { event.preventDefault(); link.click(); }
    }
  });

  function search() {
    const box = document.getElementById("search");
    if (box) { box.focus(); box.select(); return; }
    View.focusSearch = true;
    const { parts } = View.route.parse();
    View.route.go(View.route.to([/^d\d+$/.test(parts[0] || "") ? parts[0] : "d0"]));
  }
  function escape(typing) {
    if (sheet && sheet.open) return;
    if (typing) { typing.blur(); return; }
    const { parts } = View.route.parse();
    if (parts.length < 2) return;
    if (parts[0] === "item") View.route.go(View.route.to(["items"]));
    else if (parts[0] === "graph") View.route.go(View.route.to(["graphs"]));
    else View.route.go(View.route.to([parts[0]]));
  }
})();
