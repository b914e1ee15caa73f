"use strict";
// Sheets under a slider, and a chart wherever the page has a place for one. The numbers are in the element #data.
(() => {
  const { runs, charts, live } = JSON.parse(document.getElementById("data").textContent);
  const DASHES = [[], [6, 4], [2, 3]];
  const HEIGHT = 190;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const runColour = (k) => `var(--run${k % 6})`;
  const short = (v) => {
    const size = Math.abs(v);
    if (size >= 1e6) return `${+(v / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return `${+(v / 1e3).toPrecision(4)}k`;
    if (size >= 1e-3 || v === 0) return `${+v.toPrecision(4)}`;
    return v.toExponential(1);
  };
  // What a person chose survives the reload of a page that is left open; a browser may refuse to keep it.
  const kept = {
    get: (key) => { try { return sessionStorage.getItem(location.pathname + key); } catch { return null; } },
    set: (key, value) => { try { sessionStorage.setItem(location.pathname + key, value); } catch { /* not kept */ } },
  };

  for (const element of document.querySelectorAll("[data-run]")) {
    element.style.setProperty("--run", runColour(+element.dataset.run));
  }

  function sheets() {
    const slider = document.getElementById("slider");
    if (!slider) return;
    const steps = [...new Set(runs.flatMap((run) => run.sheets.map((sheet) => sheet.images)))].sort((a, b) => a - b);
    const shown = [...document.querySelectorAll("img.sheet[data-run]")];
    const show = () => {
      const images = steps[+slider.value];
      document.getElementById("at").textContent = `${images.toLocaleString("en")} images`;
      for (const image of shown) {
        // the sheet of this moment, or the last before it; a run that began later shows its first
        const all = runs[+image.dataset.run].sheets;
        const sheet = all.findLast((one) => one.images <= images) ?? all[0];
        image.src = sheet.source;
        document.querySelector(`output[data-run="${image.dataset.run}"]`).textContent = sheet.images.toLocaleString("en");
      }
    };
    slider.max = steps.length - 1;
    const before = kept.get("slider");
    slider.value = before ?? steps.length - 1;
    slider.addEventListener("input", () => {
      kept.set("slider", slider.value === slider.max ? steps.length + 1e6 : slider.value); // the end stays the end
      show();
    });
    let timer = 0;
    const play = document.getElementById("play");
    play.addEventListener("click", () => {
      const stop = () => { clearInterval(timer); timer = 0; play.textContent = "▶"; };
      if (timer) return stop();
      if (slider.value === slider.max) slider.value = 0;
      play.textContent = "❚❚";
      show();
      timer = setInterval(() => {
        slider.value = +slider.value + 1;
        show();
        if (slider.value === slider.max) stop();
      }, 500);
    });
    show();
  }

  let axis = kept.get("axis") ?? "images";
  const plots = new Map();

  // One line for a column of a run: runs differ by colour and columns by dashes; of a single run, columns by colour.
  function lines(chart) {
    const names = Object.entries(chart.columns);
    return runs.flatMap((run, r) => names.filter(([name]) => run.columns[name]).map(([name, label]) => {
      const c = names.findIndex(([other]) => other === name);
      const title = runs.length === 1 ? label : names.length === 1 ? run.name : `${run.name}, ${label}`;
      return {
        title, x: run.columns[axis] ?? [], y: run.columns[name],
        stroke: colour(`--run${(runs.length === 1 ? c : r) % 6}`), dash: runs.length === 1 ? [] : DASHES[c % 3],
      };
    }));
  }

  function draw(place) {
    const chart = charts[+place.dataset.chart];
    const log = place.querySelector(".log").getAttribute("aria-pressed") === "true";
    const box = place.querySelector(".plot");
    plots.get(place)?.destroy();
    const all = lines(chart);
    const tables = all.map(({ x, y }) => {
      const rows = x.map((at, k) => [at, y[k]]).filter(([at, v]) => at != null && v != null && !(log && v <= 0));
      return [rows.map((row) => row[0]), rows.map((row) => row[1])];
    });
    const data = tables.length ? uPlot.join(tables) : [[]];
    const few = data[0].length < 40;
    // what does not change is drawn from zero up
    const range = (u, low, high) => (low === high ? [Math.min(0, 1.2 * low), 1.2 * high || 1] : uPlot.rangeNum(low, high, 0.1, true));
    // the latest value, until the mouse asks for that of another moment
    const value = (u, v, s, at) => {
      const known = at == null ? u.data[s].findLast((one) => one != null) : v;
      return known == null ? "–" : short(known);
    };
    const line = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    const options = {
      width: Math.max(box.clientWidth, 120), height: HEIGHT,
      cursor: { sync: { key: "report" }, points: { size: 7 } },
      legend: { live: true },
      scales: { x: { time: false }, y: log ? { distr: 3 } : { range } },
      axes: [
        { ...line, size: 30, space: 60, values: (u, ticks) => ticks.map(short) },
        { ...line, size: 52, values: (u, ticks) => ticks.map((v) => (v == null ? "" : short(v))) },
      ],
      series: [
        { label: axis, value },
        ...all.map((one) => ({
          label: one.title, stroke: one.stroke, dash: one.dash, width: 2, spanGaps: true,
          points: { show: few, size: 5, fill: one.stroke }, value,
        })),
      ],
    };
    plots.set(place, new uPlot(options, data, box));
  }

  const places = [...document.querySelectorAll(".chart")];
  const drawAll = () => {
    for (const button of document.querySelectorAll("[data-axis]")) {
      button.setAttribute("aria-pressed", String(button.dataset.axis === axis));
    }
    places.forEach(draw);
  };
  for (const button of document.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => { axis = button.dataset.axis; kept.set("axis", axis); drawAll(); });
  }
  for (const place of places) {
    const button = place.querySelector(".log");
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      draw(place);
    });
  }
  const fit = new ResizeObserver((changes) => {
    for (const { target, contentRect } of changes) {
      plots.get(target.closest(".chart"))?.setSize({ width: Math.max(contentRect.width, 120), height: HEIGHT });
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  const only = document.getElementById("only");
  only?.addEventListener("change", () => {
    document.getElementById("settings").classList.toggle("only-differences", only.checked);
  });

  const reload = document.getElementById("live");
  if (live && reload) {
    reload.checked = kept.get("live") !== "off";
    reload.addEventListener("change", () => kept.set("live", reload.checked ? "on" : "off"));
    setInterval(() => { if (reload.checked && !document.hidden) location.reload(); }, 60000);
  }

  sheets();
  drawAll();
  places.forEach((place) => fit.observe(place.querySelector(".plot")));
})();
