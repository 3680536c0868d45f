"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const narrow = () => window.innerWidth < 760;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const modeBarButtons = [["toImage", "resetScale2d"]];

  function theme() {
    const axis = { gridcolor: colour("--grid"), linecolor: colour("--rule"), zerolinecolor: colour("--rule") };
    return { ink: colour("--ink"), paper: colour("--paper"), axis };
  }

  function layoutOf(chart) {
    const { ink, paper, axis } = theme();
    const given = chart.figure.layout;
    const legend = { orientation: "h", x: 0, y: -0.26, yanchor: "top", font: { size: narrow() ? 11 : 12 } };
    return Object.assign({}, given, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: paper, font: { color: ink } },
      hovermode: given.hovermode || (given.showlegend === false ? "closest" : "x unified"),
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: ink },
      margin: { l: 56, r: 14, t: 12, b: 44 },
      legend,
      xaxis: Object.assign({}, given.xaxis, axis, { automargin: true, title: { text: given.xaxis.title.text, standoff: 6 } }),
      yaxis: Object.assign({}, given.yaxis, axis, { automargin: true }),
    });
  }

  function useAxis(chart, name, place) {
    const buttons = document.querySelectorAll(`[data-chart="${chart.id}"]`);
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === place)));
    chart.figure.data.forEach((trace, i) => { trace.x = chart.axes[name][i]; });
    chart.figure.layout.xaxis.title = { text: name };
    draw(chart);
  }

  function draw(chart) {
    const options = { displaylogo: false, responsive: true, displayModeBar: narrow() ? false : "hover", modeBarButtons };
    return Plotly.react(`plot-${chart.id}`, chart.figure.data, layoutOf(chart), options);
  }

  for (const chart of charts) {
    const names = Object.keys(chart.axes || {});
    document.querySelectorAll(`[data-chart="${chart.id}"]`).forEach((button, place) => {
      button.addEventListener("click", () => useAxis(chart, names[place], place));
    });
    draw(chart);
  }
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
})();
