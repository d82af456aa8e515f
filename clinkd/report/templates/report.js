"use strict";
(() => {
  const filters = document.querySelector(".filters");
  if (!filters) return;
  const cards = [...document.querySelectorAll(".shot")];
  const count = filters.querySelector(".count");
  const wanted = { task: "", modality: "", verdict: "" };

  const apply = () => {
    let shown = 0;
    for (const card of cards) {
      card.hidden = Object.entries(wanted).some(([key, value]) => value && card.dataset[key] !== value);
      shown += card.hidden ? 0 : 1;
    }
    count.textContent = shown ? `${shown} of ${cards.length} shown` : "None of the cards fits; choose “all” somewhere.";
  };

  filters.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-filter]");
    if (!button) return;
    wanted[button.dataset.filter] = button.dataset.value;
    for (const other of button.parentElement.querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    apply();
  });

  for (const button of document.querySelectorAll("button.show")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      button.textContent = on ? "hide box" : "show box";
      for (const group of button.closest(".shot").querySelectorAll(".candidate")) {
        if (group.dataset.candidate === button.dataset.show) group.classList.toggle("on", on);
      }
    });
  }

  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("#settings details, #scores details")) details.open = true;
  });

  filters.hidden = false;
  apply();
})();
