// Light or dark: the system's choice until the reader makes one. Runs before the first paint.
"use strict";
var View = { pages: {} };
(() => {
  const KEY = "latents-theme";
  const remembered = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const now = () => document.documentElement.dataset.theme || (system.matches ? "dark" : "light");
  const kept = remembered();
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
  View.theme = {
    now,
    toggle() {
      const next = now() === "dark" ? "light" : "dark";
      document.documentElement.dataset.theme = next;
      try { localStorage.setItem(KEY, next); } catch { /* a private window keeps nothing */ }
      window.dispatchEvent(new Event("themechange"));
    },
  };
  system.addEventListener("change", () => window.dispatchEvent(new Event("themechange")));
})();
