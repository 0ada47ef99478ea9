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
      for (const error of ["error_x", "error_y"]) if (trace[error]) copy[error] = { ...trace[error], color: own };
      if (trace.fill) copy.fillcolor = faint(own);
    }
    if (role.tone !== undefined) copy.line = { ...trace.line, color: colour(role.tone) };
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

  // A point of a figure, or a link, leads to its records.
  for (const plot of plots) {
    plot.on("plotly_click", (event) => { const name = event.points[0].customdata?.point; if (name) show(name); });
  }
  for (const link of document.querySelectorAll("a[data-point]")) {
    link.addEventListener("click", (event) => { event.preventDefault(); show(link.dataset.point); });
  }
  function show(point) {
    for (const table of tables) table.show(point);
  }

  // Long tables: sorted by a column's title, filtered by words, rows that open.
  document.documentElement.classList.add("script");
  const tables = [...document.querySelectorAll("table.records")].map((table) => {
    const tools = document.querySelector(`[data-for="${table.id}"]`);
    const [search, all, told] = ["input", "button", "output"].map((name) => tools.querySelector(name));
    const rows = [...table.tBodies].map((body) => ({ body, text: body.rows[0].textContent.toLowerCase(), of: body.dataset.of.split(" ") }));
    let point = null;

    function filter() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const { body, text, of } of rows) {
        const shown = words.every((word) => text.includes(word)) && (point === null || of.includes(point));
        body.hidden = !shown;
        count += shown;
      }
      told.textContent = count === rows.length ? `${count} rows` : `${count} of ${rows.length} rows`;
      all.hidden = point === null;
    }

    function sort(head, column) {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const by = ({ body }) => body.rows[0].cells[column].dataset.by;
      const empty = (value) => value === "";
      const compare = (a, b) => {
        if (empty(a) || empty(b)) return empty(a) - empty(b);  // what is not known comes last, whichever way
        const order = Number.isNaN(Number(a)) || Number.isNaN(Number(b)) ? a.localeCompare(b) : Number(a) - Number(b);
        return down ? -order : order;
      };
      rows.sort((a, b) => compare(by(a), by(b)));
      table.append(...rows.map(({ body }) => body));
    }

    [...table.tHead.rows[0].cells].forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(head, column)));
    for (const { body } of rows) {
      const button = body.querySelector("button");
      button.addEventListener("click", () => button.setAttribute("aria-expanded", body.rows[1].classList.toggle("open")));
    }
    search.addEventListener("input", filter);
    tools.addEventListener("submit", (event) => event.preventDefault());
    all.addEventListener("click", () => { point = null; filter(); });
    return {
      show(name) {
        point = name;
        search.value = "";
        filter();
        tools.scrollIntoView({ block: "start" });
        table.querySelector("tbody:not([hidden]) button")?.focus({ preventScroll: true });
      },
    };
  });
})();
