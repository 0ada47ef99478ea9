"use strict";
// Draws every figure in the page's colours, and again when these change: dark or light, screen or paper.
(() => {
  const plots = [...document.querySelectorAll(".plot")];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const paper = window.matchMedia("print");

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const scale = () => [0, 1, 2, 3, 4].map((i) => [i / 4, colour(`scale-${i}`)]);
  const faint = (hex) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(", ")}, 0.14)`;

  function painted(trace) {
    const role = trace.meta || {};
    const copy = { ...trace };
    if (role.series !== undefined) {
      const own = colour(`series-${role.series % 8}`);
      copy.line = { ...trace.line, color: own };
      copy.marker = { ...trace.marker, color: own };
      if (trace.fill) copy.fillcolor = faint(own);
    }
    if (role.scale !== undefined) {
      copy.colorscale = scale();
      copy.colorbar = { ...trace.colorbar, tickfont: { color: colour("soft") }, outlinewidth: 0 };
    }
    return copy;
  }

  function dressed(layout) {
    const copy = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false };
    copy.font = { ...layout.font, family: getComputedStyle(document.body).fontFamily, color: colour("ink") };
    copy.hoverlabel = { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("ink") } };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
      copy[name] = { ...layout[name], gridcolor: colour("grid"), linecolor: colour("line"), tickcolor: colour("line"), fixedrange: true };
    }
    copy.shapes = (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: colour("soft") } }));
    return copy;
  }

  function draw() {
    for (const plot of plots) {
      const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
      const wide = plot.clientWidth;
      const layout = { ...dressed(figure.layout), width: wide };
      Plotly.react(plot, figure.data.map(painted), layout, { displayModeBar: false });
    }
  }

  let waiting;
  const again = () => { clearTimeout(waiting); waiting = setTimeout(draw, 120); };
  draw();
  document.documentElement.dataset.drawn = String(plots.length);
  dark.addEventListener("change", draw);
  paper.addEventListener("change", draw);
  window.addEventListener("beforeprint", draw);
  window.addEventListener("afterprint", draw);
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; again(); } });
})();
