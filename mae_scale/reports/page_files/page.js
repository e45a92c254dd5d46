"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLOURS = ["#3b82c4", "#d2693c", "#3f9b62", "#9a6cc4", "#c29a1b", "#2fa3ab", "#cf5c8d", "#7d8ea0"];
  const SHOWN_AT_FIRST = 20, MOST_SHOWN = 100, HEIGHT = 230, LOG_SPAN = 20;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  // Tables: a click on a column's name sorts by it, a second one the other way; empty cells stay last.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
        const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
        const numeric = rows.every(([text]) => text === "" || !Number.isNaN(Number(text)));
        rows.sort(([a], [b]) => {
          if (a === "" || b === "") return (a === "") - (b === "");
          const order = numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  const short = (value) =>
    value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));

  // A chart of one metric: the runs of its group that are shown.
  class Chart {
    constructor(group, about) {
      Object.assign(this, { group, about, logarithmic: !about.metric.startsWith("perf/") && spans(about.series) });
      this.readout = make("div", { class: "readout", "aria-hidden": "true" });
      this.log = make("button", { type: "button", title: "logarithmic axis" }, "log");
      this.plot = make("div", { class: "plot", role: "img" });
      this.log.hidden = !about.series.some((one) => one && one[1].some((value) => value > 0));
      this.log.addEventListener("click", () => {
        this.logarithmic = !this.logarithmic;
        this.draw();
      });
      this.element = make("article", { class: "chart" });
      this.element.append(make("header", {}, make("h4", {}, about.title), this.log), this.readout, this.plot);
      new ResizeObserver(() => {
        const width = this.plot.clientWidth;
        if (this.u && width && width !== this.u.width) this.u.setSize({ width, height: HEIGHT });
      }).observe(this.plot);
    }

    draw() {
      this.u?.destroy();
      this.u = null;
      this.runs = this.about.series.map((one, run) => [one, run]).filter(([one, run]) => one && this.group.shown.has(run));
      this.log.setAttribute("aria-pressed", this.logarithmic);
      this.plot.setAttribute("aria-label", `${this.about.title} by epoch of ${this.runs.length} runs`);
      this.readout.textContent = "";
      if (!this.runs.length) return;
      const tables = this.runs.map(([[row, values]]) => [data.epochs[row], this.logarithmic ? values.map(positive) : values]);
      this.u = new uPlot(this.options(), uPlot.join(tables), this.plot);
      if (this.group.range) this.u.setScale("x", this.group.range);
      touchZoom(this);
    }

    options() {
      const few = (u, series) => u.data[series].filter((value) => value != null).length < 3;
      const series = this.runs.map(([, run]) => ({
        label: this.group.runs[run],
        stroke: colour(run),
        dash: dashed(run) ? [6, 4] : undefined,
        width: 1.6,
        points: { show: few, size: 6 },
      }));
      const axis = (more) => ({
        stroke: () => css("--muted"), grid: { stroke: () => css("--grid"), width: 1 }, ticks: { stroke: () => css("--grid"), width: 1 },
        font: "11px system-ui, sans-serif", ...more,
      });
      return {
        width: Math.max(160, this.plot.clientWidth), height: HEIGHT, legend: { show: false },
        scales: { x: { time: false }, y: { distr: this.logarithmic ? 3 : 1 } },
        series: [{}, ...series],
        axes: [axis({ size: 28 }), axis({ size: 58, values: (u, splits) => splits.map((v) => (v == null ? "" : short(v))) })],
        cursor: { drag: { x: true, y: false, setScale: false }, points: { show: false }, bind: { dblclick: () => () => this.group.zoom(null) } },
        hooks: {
          setSelect: [(u) => this.select(u)],
          setCursor: [(u) => this.say(u)],
          setScale: [(u, key) => key === "x" && (this.element.dataset.range = `${u.scales.x.min} ${u.scales.x.max}`)],
        },
      };
    }

    select(u) {
      const { left, width } = u.select;
      if (width < 4) return;
      const range = { min: u.posToVal(left, "x"), max: u.posToVal(left + width, "x") };
      u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      this.group.zoom(range);
    }

    // The run nearest to the pointer, with its value there.
    say(u) {
      const { left, top, idx } = u.cursor;
      let best = null;
      if (left >= 0 && idx != null) {
        u.data.slice(1).forEach((values, number) => {
          const at = nearest(values, idx);
          if (at === null) return;
          const away = Math.abs(u.valToPos(values[at], "y") - top) + 0.3 * Math.abs(u.valToPos(u.data[0][at], "x") - left);
          if (best === null || away < best.away) best = { away, at, number };
        });
      }
      if (best === null) {
        this.readout.textContent = "";
        return;
      }
      const name = this.group.runs[this.runs[best.number][1]];
      this.readout.textContent = `${short(u.data[best.number + 1][best.at])} at epoch ${short(u.data[0][best.at])} \u2013 ${name}`;
    }
  }

  const positive = (value) => (value > 0 ? value : null);
  const colour = (run) => COLOURS[run % COLOURS.length];
  const dashed = (run) => Math.floor(run / COLOURS.length) % 2 === 1;

  function spans(series) {
    let low = Infinity, high = -Infinity;
    for (const one of series) for (const value of one ? one[1] : []) if (value != null) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    return low > 0 && high > LOG_SPAN * low;
  }

  function nearest(values, index) {
    for (let away = 0; away < values.length; away++) {
      if (values[index - away] != null) return index - away;
      if (values[index + away] != null) return index + away;
    }
    return null;
  }

  // A finger that moves sideways selects as the mouse does; up and down scrolls the page.
  function touchZoom(chart) {
    const over = chart.u.over, u = chart.u;
    let from = null;
    const at = (event) => Math.min(Math.max(event.clientX - over.getBoundingClientRect().left, 0), over.clientWidth);
    over.addEventListener("pointerdown", (event) => (from = event.pointerType === "touch" ? at(event) : null));
    over.addEventListener("pointercancel", () => (from = null));
    over.addEventListener("pointermove", (event) => {
      if (from === null) return;
      const to = at(event);
      u.setSelect({ left: Math.min(from, to), width: Math.abs(to - from), top: 0, height: over.clientHeight }, false);
    });
    over.addEventListener("pointerup", () => {
      if (from !== null && u.select.width >= 10) chart.select(u);
      from = null;
    });
  }

  // The charts of one kind of training: which runs are shown, and the stretch of epochs.
  class Group {
    constructor(about) {
      Object.assign(this, { runs: about.runs, range: null, shown: new Set() });
      for (let run = 0; run < Math.min(SHOWN_AT_FIRST, this.runs.length); run++) this.shown.add(run);
      this.charts = about.charts.map((chart) => new Chart(this, chart));
      this.chips = this.runs.map((name, run) => this.chip(name, run));
      this.said = make("span", { class: "muted", role: "status" });
      this.element = make("section", { "aria-label": `Curves of ${about.kind}` });
      if (data.groups.length > 1) this.element.append(make("h3", {}, about.kind));
      this.element.append(this.bar(), make("div", { class: "chips" }, ...this.chips));
      this.element.append(make("div", { class: "charts" }, ...this.charts.map((chart) => chart.element)));
    }

    bar() {
      const button = (label, action) => {
        const element = make("button", { type: "button" }, label);
        element.addEventListener("click", action);
        return element;
      };
      const bar = make("div", { class: "bar" }, button("Reset zoom", () => this.zoom(null)));
      if (this.runs.length > 1) {
        bar.append(button("Show all", () => this.show(true)), button("Show none", () => this.show(false)));
      }
      if (this.runs.length > 12) {
        const filter = make("input", { type: "search", placeholder: "names with \u2026", "aria-label": "Filter runs by name" });
        filter.addEventListener("input", () => {
          const word = filter.value.toLowerCase();
          this.chips.forEach((chip, run) => (chip.hidden = !this.runs[run].toLowerCase().includes(word)));
        });
        bar.append(filter);
      }
      bar.append(this.said);
      return bar;
    }

    chip(name, run) {
      const line = make("i", dashed(run) ? { class: "dash" } : {});
      line.style.setProperty("--c", colour(run));
      const chip = make("button", { type: "button", class: "chip" }, line, name);
      chip.addEventListener("click", () => {
        if (!this.shown.delete(run)) this.shown.add(run);
        this.draw();
      });
      return chip;
    }

    // All or none of the runs whose names match the filter.
    show(all) {
      this.chips.forEach((chip, run) => {
        if (!chip.hidden) this.shown[all ? "add" : "delete"](run);
      });
      this.draw();
    }

    zoom(range) {
      this.range = range;
      for (const { u } of this.charts) {
        if (u && range) u.setScale("x", range);
        else if (u) u.setData(u.data);
      }
    }

    draw() {
      const kept = [...this.shown].sort((a, b) => a - b).slice(0, MOST_SHOWN);
      const cut = this.shown.size > MOST_SHOWN ? `; at most ${MOST_SHOWN} are drawn at once` : "";
      this.shown = new Set(kept);
      this.said.textContent = this.runs.length > 1 ? `${kept.length} of ${this.runs.length} runs drawn${cut}` : "";
      this.chips.forEach((chip, run) => chip.setAttribute("aria-pressed", this.shown.has(run)));
      for (const chart of this.charts) chart.draw();
    }
  }

  const groups = data.groups.map((about) => new Group(about));
  document.getElementById("groups")?.append(...groups.map((group) => group.element));
  const draw = () => groups.forEach((group) => group.draw());
  dark.addEventListener("change", draw);
  draw();
})();
