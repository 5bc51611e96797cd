// On every page: light or dark, kept for the next visit, and the keys that lead from page to page. Runs before anything is drawn.
"use strict";
(() => {
  const root = document.documentElement;
  const kept = localStorage.getItem("theme");
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  const isDark = () => getComputedStyle(root).colorScheme === "dark" || (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const toggle = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  };
  document.addEventListener("click", (event) => { if (event.target.closest("#theme")) toggle(); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog[open]")) return;
    if (event.key === "d") toggle();
    if ("123".includes(event.key)) document.querySelectorAll(".bar nav a")[Number(event.key) - 1]?.click();
  });
})();
