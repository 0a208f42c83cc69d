"use strict";
(function () {
  function show(input) {
    const box = input.closest("[data-stages]");
    const frames = box.querySelectorAll(".frame");
    const chosen = frames[Number(input.value)];
    frames.forEach(function (frame) { frame.hidden = frame !== chosen; });
    input.setAttribute("aria-valuetext", chosen.dataset.label);
    box.querySelector("output").textContent = chosen.dataset.label;
  }
  function ready() {
    document.querySelectorAll("[data-stages]").forEach(function (box) {
      box.querySelector(".control").hidden = false;
      show(box.querySelector("input"));
    });
  }
  document.addEventListener("input", function (event) {
    if (event.target.matches("[data-stages] input")) { show(event.target); }
  });
  ready();

  const seconds = Number(document.documentElement.dataset.refresh || 0);
  if (!seconds) { return; }
  function remember() {
    const state = { open: [], values: {} };
    document.querySelectorAll("details[open]").forEach(function (d) { state.open.push(d.id); });
    document.querySelectorAll("[data-stages] input").forEach(function (i) {
      if (i.value !== i.max) { state.values[i.id] = i.value; }
    });
    return state;
  }
  function restore(state) {
    state.open.forEach(function (id) { const d = document.getElementById(id); if (d) { d.open = true; } });
    Object.keys(state.values).forEach(function (id) {
      const input = document.getElementById(id);
      if (input) { input.value = state.values[id]; }
    });
  }
  async function news() {
    const said = document.getElementById("news");
    try {
      const version = await (await fetch("/version", { cache: "no-store" })).text();
      if (version !== document.querySelector("main").dataset.version) {
        const text = await (await fetch("/", { cache: "no-store" })).text();
        const fresh = new DOMParser().parseFromString(text, "text/html").querySelector("main");
        const state = remember();
        document.querySelector("main").replaceWith(document.adoptNode(fresh));
        restore(state);
        ready();
      } else {
        said.textContent = "";
      }
    } catch (error) {
      said.textContent = "No answer from stylegan-rooted watch: this page no longer changes.";
    }
  }
  setInterval(function () { if (!document.hidden) { news(); } }, seconds * 1000);
})();
