// On every page: light or dark, kept for the next visit, which page of the bar this is, the help, and the keys that lead from page
// to page. Runs before anything is drawn.
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
  const help = () => document.getElementById("keys").showModal();
  const place = () => {
    const here = location.pathname.startsWith("/sample/") ? "/" : location.pathname;
    for (const link of document.querySelectorAll(".bar nav a")) {
      if (link.getAttribute("href") === here) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  };
  document.addEventListener("DOMContentLoaded", place);
  window.addEventListener("popstate", place);
  document.addEventListener("click", (event) => {
    if (event.target.closest("#theme")) toggle();
    if (event.target.closest("#help")) help();
    if (event.target.id === "keys") event.target.close(); // beside the box
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog[open]")) return;
    if (event.key === "d") toggle();
    if (event.key === "?") help();
    if ("1234".includes(event.key)) document.querySelectorAll(".bar nav a")[Number(event.key) - 1]?.click();
  });
})();
