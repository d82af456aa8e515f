"use strict";
(() => {
  const filters = document.querySelector(".filters");
  if (!filters) return;
  const cards = [...document.querySelectorAll(".shot")];
  const count = filters.querySelector(".count");
  const more = document.querySelector("#more");
  const page = 12; // cards at first, and with each press of the button
  let most = page;
  const wanted = { task: "", modality: "", verdict: "" };

  const apply = () => {
    const fits = (card) => Object.entries(wanted).every(([key, value]) => !value || card.dataset[key] === value);
    const fitting = cards.filter(fits);
    const shown = new Set(fitting.slice(0, most));
    for (const card of cards) card.hidden = !shown.has(card);
    more.parentElement.hidden = shown.size === fitting.length;
    count.textContent = fitting.length
      ? `${shown.size} of ${fitting.length} shown`
      : "None of the cards fits; choose “all” somewhere.";
  };

  filters.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-filter]");
    if (!button) return;
    wanted[button.dataset.filter] = button.dataset.value;
    for (const other of button.parentElement.querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    most = page;
    apply();
  });

  more.addEventListener("click", () => {
    most += page;
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
    most = cards.length;
    apply();
    for (const details of document.querySelectorAll("#settings details, #scores details")) details.open = true;
  });

  filters.hidden = false;
  apply();
})();
