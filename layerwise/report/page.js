(function () {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const options = { responsive: true, displayModeBar: false };

  function themed(figure) {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const layout = structuredClone(figure.layout);
    layout.font = Object.assign({}, layout.font, { color: read("--text") });
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis/.test(key)) {
        Object.assign(layout[key], { gridcolor: read("--line"), zerolinecolor: read("--line"), linecolor: read("--line") });
      }
    }
    layout.hoverlabel = Object.assign({}, layout.hoverlabel, {
      bgcolor: read("--card"), bordercolor: read("--line"), font: { color: read("--text"), size: 13 },
    });
    return layout;
  }

  function draw(place) {
    const figure = figures[place.dataset.figure];
    Plotly.react(place, structuredClone(figure.data), themed(figure), options);
  }

  function drawAll() {
    document.querySelectorAll("[data-figure]").forEach(draw);
  }

  const choice = document.getElementById("column");
  if (choice) {
    const place = document.getElementById("score");
    const about = document.getElementById("column-about");
    const show = function () {
      place.dataset.figure = "score-" + choice.value;
      about.textContent = choice.selectedOptions[0].dataset.about;
      place.setAttribute("aria-label", choice.selectedOptions[0].textContent + " for every layer");
      draw(place);
    };
    choice.addEventListener("change", show);
    show();
  }
  drawAll();
  dark.addEventListener("change", drawAll);
})();
