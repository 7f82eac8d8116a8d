"use strict";
/* One drawing function per chart type, driven by data alone: a panel in Python needs no JavaScript.
   Text always enters as text nodes, never as markup: names of classes and files may be hostile. */

const Charts = (() => {
  const colours = JSON.parse(document.getElementById("colours").textContent);
  function bytes(base64) {
    const text = atob(base64), data = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) data[i] = text.charCodeAt(i); // Uint8Array.from is ten times slower
    return data;
  }
  const tables = { signed: bytes(colours.signed), positive: bytes(colours.positive) };
  const ramp = (table) => `linear-gradient(90deg,${Array.from({ length: 33 }, (_, i) =>
    `rgb(${table.slice(3 * Math.round((i * (table.length / 3 - 1)) / 32)).slice(0, 3).join(" ")})`).join(",")})`;
  const ramps = { signed: ramp(tables.signed), positive: ramp(tables.positive) };
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const categories = colours.categories.map(rgb);
  const at = (list, i) => list[i % list.length];

  /* ---- elements and numbers ---- */

  function make(space, name, attributes, children) {
    const node = space ? document.createElementNS(space, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key === "style") node.style.cssText = value;
      else if (value === true) node.setAttribute(key, "");
      else if (value !== false && value != null) node.setAttribute(key, value);
    }
    node.append(...children.flat().filter((child) => child != null));
    return node;
  }
  const el = (name, attributes, ...children) => make(null, name, attributes, children);
  const svg = (name, attributes, ...children) => make("http://www.w3.org/2000/svg", name, attributes, children);

  const minus = (text) => text.replace(/-/g, "−");
  const decimals = (size) => (size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4);
  function number(value) {
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size < 0.001 || size >= 1e6) return minus(value.toExponential(1));
    return minus(value.toFixed(decimals(size)));
  }
  function format(value, unit) {
    if (value == null) return "–";
    if (unit === "%") return minus((100 * value).toFixed(1)) + " %";
    return number(value) + (unit ? " " + unit : "");
  }
  const short = (value) => minus(String(parseFloat(value.toPrecision(2))));
  const signed = (value, unit) => (value > 0 ? "+" : "") + format(value, unit);

  const ROUND = [1, 2, 2.5, 5, 10], WHOLE = [1, 2, 5, 10];
  function ticks(low, high, count, steps = ROUND) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = steps.map((s) => s * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }

  /* ---- trend: scalars over epochs, lines or stacked shares; hover reads, click selects the epoch ---- */

  function trend(chart, ctx) {
    const share = chart.style === "share";
    const palette = share ? [...colours.categories, ...colours.series] : colours.series;
    const series = chart.keys
      .map((key, i) => ({ label: chart.labels[i], colour: at(palette, i), dash: at(["", "", "", "7 3", "2 3", "9 3 2 3"], i),
                          values: ctx.history.map((e) => e.scalars[key] ?? null) }))
      .filter((s) => s.values.some((v) => v !== null));
    const title = el("h3", { class: "chart-title" }, chart.title);
    if (ctx.single && series.length) return bars({ title: chart.title, labels: series.map((s) => s.label), values: series.map((s) => s.values[0]), unit: share ? "%" : chart.unit });
    if (!series.length) return el("figure", { class: "card" }, title, el("p", { class: "muted" }, "No values yet."));
    const readings = series.map(() => el("b", {}));
    const legend = el("div", { class: "legend" }, series.map((s, i) =>
      el("span", {}, el("i", { class: share ? "" : "stroke", style: `background:${s.colour}` }), s.label, readings[i])));
    const holder = el("div", {});
    ctx.after.push({ holder, draw: (width) => drawTrend(chart, ctx, series, readings, holder, width, share) });
    return el("figure", { class: "card" }, title, legend, holder);
  }

  function drawTrend(chart, ctx, series, readings, holder, space, share) {
    const width = Math.max(space, 200), height = ctx.height || 216, left = 50, right = width - 12, top = chart.unit && chart.unit !== "%" ? 20 : 8, bottom = height - 34;
    const epochs = ctx.history.map((e) => e.epoch);
    const all = series.flatMap((s) => s.values.filter((v) => v !== null));
    let [low, high] = share ? [0, 1] : chart.limits || [Math.min(0, ...all), Math.max(...all)];
    if (!(high > low)) high = low + 1;
    if (!share && !chart.limits) { const marks = ticks(low, high, 4), step = marks[1] - marks[0]; high = Math.ceil(high / step - 1e-9) * step; low = Math.floor(low / step + 1e-9) * step; }
    const first = epochs[0], span = epochs.at(-1) - first;
    const x = (i) => span ? left + ((epochs[i] - first) / span) * (right - left) : (left + right) / 2;
    const y = (v) => bottom - ((Math.min(Math.max(v, low), high) - low) / (high - low)) * (bottom - top);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${chart.title}: ` +
      series.map((s) => `${s.label} ${format(s.values[ctx.index], chart.unit)}`).join(", ") + ` at epoch ${epochs[ctx.index]}` });
    for (const v of ticks(low, high, 4)) picture.append(
      svg("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }),
      svg("text", { x: left - 7, y: y(v) + 4, "text-anchor": "end" }, chart.unit === "%" || share ? `${Math.round(100 * v)} %` : short(v)));
    for (const e of span ? ticks(first, epochs.at(-1), Math.min(span, width / 70), WHOLE) : [first]) {
      if (!Number.isInteger(e)) continue;
      const p = span ? left + ((e - first) / span) * (right - left) : (left + right) / 2;
      picture.append(svg("text", { x: p, y: bottom + 16, "text-anchor": "middle" }, String(e)));
    }
    picture.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      svg("text", { x: (left + right) / 2, y: height - 3, "text-anchor": "middle" }, "epoch"));
    if (chart.unit && chart.unit !== "%") picture.append(svg("text", { x: left, y: 9, "text-anchor": "start" }, chart.unit));
    if (share) drawShares(picture, series, epochs, x, y, 6);
    else drawLines(picture, series, epochs, x, y);
    for (const alarm of ctx.alarms || []) {
      const i = epochs.indexOf(alarm.epoch);
      if (i >= 0) picture.append(svg("g", { class: "alarm" }, svg("line", { x1: x(i), x2: x(i), y1: top, y2: bottom }),
        svg("path", { d: `M${x(i)} ${top + 10}l-6 -10h12z` }), svg("title", {}, `${alarm.text}${alarm.action ? " → " + alarm.action : ""}`)));
    }
    const now = svg("line", { class: "now", y1: top, y2: bottom });
    const dots = share ? [] : series.map((s) => svg("circle", { r: 4, fill: s.colour, stroke: "var(--card)", "stroke-width": 1.5 }));
    picture.append(now, ...dots);
    function point(i) {
      now.setAttribute("x1", x(i)); now.setAttribute("x2", x(i));
      series.forEach((s, k) => {
        readings[k].textContent = format(s.values[i], share ? "%" : chart.unit);
        if (!dots[k]) return;
        dots[k].style.display = s.values[i] === null ? "none" : "";
        dots[k].setAttribute("cx", x(i)); dots[k].setAttribute("cy", y(s.values[i] ?? 0));
      });
    }
    const nearest = (event) => {
      const p = (event.offsetX / picture.clientWidth) * width;
      return epochs.reduce((best, _, i) => (Math.abs(x(i) - p) < Math.abs(x(best) - p) ? i : best), 0);
    };
    picture.append(svg("rect", { class: "hit", x: left - 10, y: 0, width: right - left + 20, height: bottom, fill: "transparent",
      onpointermove: (e) => point(nearest(e)), onpointerleave: () => point(ctx.index), onclick: (e) => ctx.select(nearest(e)) }));
    point(ctx.index);
    holder.replaceChildren(picture);
  }

  function drawLines(picture, series, epochs, x, y) {
    for (const s of series) {
      let path = ""; // straight over epochs without a value: panels may be drawn every n epochs only
      s.values.forEach((v, i) => { if (v !== null) path += `${path ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`; });
      picture.append(svg("path", { d: path, fill: "none", stroke: s.colour, "stroke-width": 2.2, "stroke-linejoin": "round", "stroke-dasharray": s.dash }));
    }
  }

  function drawShares(picture, series, epochs, x, y, half) {
    const known = epochs.map((_, i) => i).filter((i) => series.some((s) => s.values[i] !== null));
    let floor = known.map(() => 0);
    for (const s of series) {
      const roof = floor.map((f, k) => f + (s.values[known[k]] ?? 0));
      const edge = (level) => level.flatMap((v, k) => {
        const p = x(known[k]);
        return known.length > 1 ? [[p, y(v)]] : [[p - half, y(v)], [p + half, y(v)]];
      });
      const points = [...edge(roof), ...edge(floor).reverse()].map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" ");
      picture.append(svg("polygon", { points, fill: s.colour, stroke: "var(--card)", "stroke-width": 0.8 }));
      floor = roof;
    }
  }

  /* ---- bars ---- */

  function bars(chart) {
    const reference = chart.reference || [];
    const low = Math.min(0, ...chart.values, ...reference), high = Math.max(0, ...chart.values, ...reference) || 1;
    const place = (v) => (100 * (v - low)) / (high - low), whole = chart.values.every((v) => v === null || Number.isInteger(v));
    const rows = chart.labels.flatMap((label, i) => {
      const value = chart.values[i];
      const bar = value == null ? null : el("i", { style: `left:${place(Math.min(0, value))}%;width:${place(low + Math.abs(value))}%;` +
        `background:${at(colours.series, value < 0 ? 0 : 1)}` });
      const mark = reference[i] == null ? null : el("em", { style: `left:${place(reference[i])}%`, title: `${chart.reference_label} ${format(reference[i], chart.unit)}` });
      return [el("span", { class: "name" }, label), el("span", { class: "track" }, bar, mark), el("span", { class: "value" }, chart.unit === "%" ? format(value, "%") : whole ? String(value) : format(value))];
    });
    const legend = el("div", { class: "legend muted" }, chart.unit && chart.unit !== "%" ? el("span", {}, `in ${chart.unit}`) : null,
      chart.reference && el("span", {}, el("i", { style: "width:2px;height:0.9rem;border-radius:0;background:var(--ink)" }), chart.reference_label));
    return el("figure", { class: "card" }, el("h3", { class: "chart-title" }, chart.title), legend, el("div", { class: "bars" }, rows));
  }

  /* ---- intervals: a forest plot; what crosses the line at 0 is not told apart from it ---- */

  function intervals(chart) {
    const place = (v) => 50 + (50 * Math.max(-chart.limit, Math.min(chart.limit, v))) / chart.limit;
    const rows = chart.names.flatMap((name, i) => {
      const [low, middle, high] = [chart.low[i], chart.middle[i], chart.high[i]], apart = low !== null && (low > 0 || high < 0);
      const bar = low === null ? null : el("i", { class: apart ? "apart" : "", style: `left:${place(low)}%;width:${place(high) - place(low)}%` },
        low < -chart.limit && el("span", { class: "cut" }, "◂") || null, high > chart.limit && el("span", { class: "cut right" }, "▸") || null);
      const dot = middle === null ? null : el("b", { class: apart ? "apart" : "", style: `left:${place(middle)}%` });
      return [el("span", { class: "name" }, name), el("span", { class: "track" }, el("em", { style: "left:50%" }), bar, dot), el("span", { class: "value" }, chart.texts[i])];
    });
    const marks = ticks(-chart.limit, chart.limit, 4).map((v) => el("span", { style: `left:${place(v)}%` }, short(v)));
    return el("figure", { class: "card wide" }, el("h3", { class: "chart-title" }, chart.title),
      el("div", { class: "bars intervals" }, rows, el("span", {}), el("span", { class: "ruler" }, marks), el("span", {})),
      el("p", { class: "muted" }, chart.x_label));
  }

  /* ---- lines: curves over one axis; hover reads all of them ---- */

  const tickText = (value, unit) => (unit === "%" ? `${Math.round(100 * value)} %` : short(value));

  /* Axes with grid and titles inside a picture; returns where the values lie. */
  function frame(picture, width, height, xs, ys, names) {
    const left = 54, right = width - 14, top = 20, bottom = height - 38;
    const x = (v) => left + ((v - xs.low) / (xs.high - xs.low)) * (right - left);
    const y = (v) => bottom - ((v - ys.low) / (ys.high - ys.low)) * (bottom - top);
    for (const v of ticks(ys.low, ys.high, 4)) picture.append(
      svg("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }),
      svg("text", { x: left - 7, y: y(v) + 4, "text-anchor": "end" }, tickText(v, ys.unit)));
    if (names.places) nameplates(picture, names.places, x, bottom, right - left);
    else for (const v of ticks(xs.low, xs.high, Math.max(2, Math.min(6, width / 90)), xs.whole ? WHOLE : ROUND)) if (!xs.whole || Number.isInteger(v)) picture.append(
      svg("text", { x: x(v), y: bottom + 16, "text-anchor": "middle" }, tickText(v, xs.unit)));
    picture.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, names.x),
      svg("text", { x: 4, y: 11, "text-anchor": "start" }, names.y));
    return { x, y, left, right, top, bottom };
  }

  /* Names under an axis, as many as fit, the last one always. */
  function nameplates(picture, names, x, bottom, width) {
    const every = Math.ceil((names.length * 74) / Math.max(width, 74));
    names.forEach((name, k) => { if ((names.length - 1 - k) % every === 0) picture.append(svg("text", { x: x(k), y: bottom + 16,
      "text-anchor": k === names.length - 1 && k ? "end" : k === 0 ? "start" : "middle" }, name.length > 12 ? "…" + name.slice(-11) : name)); });
  }

  function range(values, least) {
    let low = Math.min(...values, ...least), high = Math.max(...values, ...least);
    if (!Number.isFinite(low) || !(high > low)) { low = Number.isFinite(low) ? low : 0; high = low + 1; }
    return { low, high };
  }

  function lines(chart, ctx) {
    const readings = chart.labels.map(() => el("b", {}));
    const legend = el("div", { class: "legend" }, chart.labels.map((label, i) =>
      el("span", {}, el("i", { class: "stroke", style: `background:${at(colours.series, i)}` }), label, readings[i])));
    const holder = el("div", {});
    ctx.after.push({ holder, draw: (space) => drawCurves(chart, readings, holder, space) });
    return el("figure", { class: "card" }, el("h3", { class: "chart-title" }, chart.title), legend, holder);
  }

  function drawCurves(chart, readings, holder, space) {
    const spread = chart.spread || [], named = chart.x_names && chart.x_names.length ? chart.x_names : null;
    const width = Math.max(space, 200), height = 250, all = [...chart.series, ...spread.filter(Boolean).flat()].flat().filter((v) => v !== null);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${chart.title}: ` +
      chart.labels.map((label, i) => `${label} ends at ${format(chart.series[i].at(-1), chart.unit)}`).join(", ") });
    const ys = chart.limits ? { low: chart.limits[0], high: chart.limits[1] } : range(all, [0]);
    const f = frame(picture, width, height, { ...range(chart.x, []), unit: chart.x_unit, whole: chart.x.every(Number.isInteger) && chart.x.length > 2 }, { ...ys, unit: chart.unit },
      { x: chart.x_label, y: chart.unit === "%" ? "" : chart.unit, places: named });
    spread.forEach((edges, i) => {
      if (!edges) return;
      const edge = (values) => values.map((v, k) => [chart.x[k], v]).filter(([, v]) => v !== null).map(([p, v]) => `${f.x(p).toFixed(1)},${f.y(v).toFixed(1)}`);
      picture.append(svg("polygon", { points: [...edge(edges[1]), ...edge(edges[0]).reverse()].join(" "), fill: at(colours.series, i), "fill-opacity": 0.16 }));
    });
    chart.series.forEach((values, i) => {
      let path = "", pen = "M";
      values.forEach((v, k) => { if (v === null) pen = "M"; else { path += `${pen}${f.x(chart.x[k]).toFixed(1)} ${f.y(v).toFixed(1)}`; pen = "L"; } });
      picture.append(svg("path", { d: path, fill: "none", stroke: at(colours.series, i), "stroke-width": 2.2, "stroke-linejoin": "round",
        "stroke-dasharray": at(["", "", "", "7 3", "2 3", "9 3 2 3"], i) }));
    });
    const now = svg("line", { class: "now", y1: f.top, y2: f.bottom });
    function point(k) {
      now.style.display = k === null ? "none" : "";
      if (k !== null) { now.setAttribute("x1", f.x(chart.x[k])); now.setAttribute("x2", f.x(chart.x[k])); }
      readings.forEach((node, i) => { node.textContent = format(chart.series[i][k ?? chart.x.length - 1], chart.unit); });
    }
    const nearest = (event) => {
      const p = (event.offsetX / picture.clientWidth) * width;
      return chart.x.reduce((best, v, k) => (Math.abs(f.x(v) - p) < Math.abs(f.x(chart.x[best]) - p) ? k : best), 0);
    };
    picture.append(now, svg("rect", { class: "hit", x: f.left - 10, y: 0, width: f.right - f.left + 20, height: f.bottom, fill: "transparent",
      onpointermove: (e) => point(nearest(e)), onpointerleave: () => point(null) }));
    point(null);
    holder.replaceChildren(picture);
  }

  /* ---- scatter: a group at a time; pointing names a point, choosing it keeps its details below ---- */

  function scatter(chart, ctx) {
    const key = `${ctx.view}/${ctx.chart}`;
    const state = (ctx.ui[key] ||= { group: chart.groups.length - 1, name: null });
    if (state.group >= chart.groups.length) state.group = chart.groups.length - 1;
    if (state.name === null) state.name = strongest(chart, state.group);
    const holder = el("div", {}), below = el("div", { class: "detail" });
    let width = 0;
    const chips = chart.groups.map((name, g) => el("button", { type: "button", class: "chip", "aria-pressed": String(g === state.group),
      onclick: () => { state.group = g; state.name = strongest(chart, g); chips.forEach((c, k) => c.setAttribute("aria-pressed", k === g)); redraw(); } }, name));
    const redraw = () => { drawScatter(chart, state, holder, width, show); show(chosen(chart, state)); };
    function show(i) {
      const row = i === null ? -1 : chart.detail_rows[i] ?? -1;
      if (!chart.details) return;
      if (row < 0) { below.replaceChildren(el("p", { class: "muted" }, i === null ? "Point at a mark, or choose it, to see its maps." : `${chart.names[i]}: no maps are kept for it.`)); return; }
      const all = chart.details, limits = Object.fromEntries(Object.entries(all.limits).map(([group, values]) => [group, [values[row]]]));
      const one = { ...all, limits, rows: [all.rows[row]], columns: all.columns.map((c) => ({ ...c, cells: [c.cells[row]] })) };
      below.replaceChildren(maps(one, { ...ctx, chart: `${ctx.chart}/detail` }));
    }
    ctx.after.push({ holder, draw: (space) => { width = space; redraw(); } });
    return el("figure", { class: `card${chart.details ? " wide" : ""}` }, el("h3", { class: "chart-title" }, chart.title),
      el("div", { class: "legend" }, chart.groups.length > 1 ? chips : null,
        chart.size_label && el("span", { class: "muted" }, `size of a mark: ${chart.size_label}`) || null,
        chart.line?.length > 1 && el("span", { class: "muted" }, `line: ${chart.line_label}`) || null,
        chart.diagonal && el("span", { class: "muted" }, `dashed line: ${chart.diagonal}`) || null),
      el("div", { class: "beside" }, holder, chart.details ? below : null));
  }

  /* What is shown before anybody points: the mark with details that lies furthest out. */
  function strongest(chart, group) {
    let best = -1;
    chart.names.forEach((_, i) => {
      const out = (k) => chart.x[k] + chart.y[k];
      if (chart.group[i] === group && (chart.detail_rows[i] ?? -1) >= 0 && (best < 0 || out(i) > out(best))) best = i;
    });
    return best < 0 ? null : chart.names[best];
  }

  const chosen = (chart, state) => {
    const i = chart.names.findIndex((name, k) => name === state.name && chart.group[k] === state.group);
    return i < 0 ? null : i;
  };

  function drawScatter(chart, state, holder, space, show) {
    const width = Math.max(Math.min(space, 620), 200), height = Math.min(width * 0.72, 380);
    const inside = chart.names.map((_, i) => i).filter((i) => chart.group[i] === state.group && chart.x[i] !== null && chart.y[i] !== null);
    const pad = ({ low, high }) => ({ low: low - 0.04 * (high - low), high: high + 0.04 * (high - low) });
    const joined = chart.line ?? []; // pages of before have none
    const span = (of) => pad(range([...inside, ...joined].map((i) => of[i]), chart.named ? [] : [0]));
    let xs = span(chart.x), ys = span(chart.y);
    if (chart.diagonal) xs = ys = { low: Math.min(xs.low, ys.low), high: Math.max(xs.high, ys.high) };
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, width, role: "img", "aria-label": `${chart.title}, ${chart.groups[state.group]}: ${inside.length} points` });
    holder.replaceChildren(picture); // names are measured where they stand
    const f = frame(picture, width, height, xs, ys, { x: chart.x_label, y: chart.y_label });
    if (chart.diagonal) picture.append(svg("line", { class: "diagonal", x1: f.x(xs.low), y1: f.y(xs.low), x2: f.x(xs.high), y2: f.y(xs.high) }));
    else if (!chart.named) for (const [x1, y1, x2, y2] of [[f.x(0), f.top, f.x(0), f.bottom], [f.left, f.y(0), f.right, f.y(0)]]) picture.append(svg("line", { class: "axis", x1, y1, x2, y2 }));
    const most = Math.max(...inside.map((i) => chart.size[i] || 0), 1e-12);
    const colour = at(colours.series, 1);
    if (joined.length > 1) picture.append(svg("polyline", { class: "joined", points: joined.map((i) => `${f.x(chart.x[i])},${f.y(chart.y[i])}`).join(" ") }));
    const order = [...inside].sort((a, b) => chart.size[b] - chart.size[a]); // small marks on top of large ones
    for (const i of order) {
      const mark = svg("circle", { class: "mark-point", cx: f.x(chart.x[i]), cy: f.y(chart.y[i]), r: chart.size_label ? 2.5 + 9 * Math.sqrt(Math.max(chart.size[i], 0) / most) : 4,
        fill: colour, tabindex: 0, role: "button", "aria-label": reading(i), "data-name": chart.names[i], "aria-pressed": String(chart.names[i] === state.name),
        onpointermove: (e) => { hint(e, reading(i)); show(i); }, onpointerleave: () => { tip.hidden = true; show(chosen(chart, state)); },
        onclick: () => choose(i), onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(i); } } });
      picture.append(mark);
    }
    if (chart.named) beside(picture, inside.map((i) => ({ x: f.x(chart.x[i]), y: f.y(chart.y[i]), text: chart.names[i] })), f);
    function reading(i) {
      return `${chart.names[i]}\n${chart.x_label}: ${number(chart.x[i])}\n${chart.y_label}: ${number(chart.y[i])}` + (chart.size_label ? `\n${chart.size_label}: ${number(chart.size[i] ?? 0)}` : "");
    }
    function choose(i) {
      state.name = state.name === chart.names[i] ? null : chart.names[i];
      for (const mark of picture.querySelectorAll(".mark-point")) mark.setAttribute("aria-pressed", mark.dataset.name === state.name);
      show(chosen(chart, state));
    }
  }

  /* Names beside their marks: the first of a few places that lies inside and on no mark or name; without one, pointing tells. */
  function beside(picture, points, f) {
    const taken = points.map((p) => ({ left: p.x - 5, right: p.x + 5, top: p.y - 5, bottom: p.y + 5 }));
    const free = (box) => box.left > f.left && box.right < f.right + 10 && box.top > f.top && box.bottom < f.bottom
      && taken.every((other) => box.right < other.left || box.left > other.right || box.bottom < other.top || box.top > other.bottom);
    for (const p of [...points].sort((a, b) => a.y - b.y)) {
      const text = svg("text", { class: "beside", x: 0, y: 0 }, p.text);
      picture.append(text);
      const wide = text.getComputedTextLength?.() || 6.2 * p.text.length;
      const box = (left, middle) => ({ left, right: left + wide, top: middle - 6, bottom: middle + 6 });
      const place = [0, -11, 11].flatMap((up) => [box(p.x + 8, p.y + up), box(p.x - 8 - wide, p.y + up)]).concat(box(p.x - wide / 2, p.y - 14), box(p.x - wide / 2, p.y + 14)).find(free);
      if (!place) { text.remove(); continue; }
      taken.push(place);
      text.setAttribute("x", place.left);
      text.setAttribute("y", place.bottom - 2);
    }
  }

  function hint(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8)}px`;
  }

  /* Words for a command line, with a button that copies them; without a clipboard (some browsers, file://) they are selected. */
  function command(words) {
    const text = el("code", {}, words), button = el("button", { type: "button", class: "chip", onclick: copy }, "copy");
    async function copy() {
      try { await navigator.clipboard.writeText(words); button.textContent = "copied"; }
      catch { getSelection().selectAllChildren(text); button.textContent = "selected"; }
    }
    return el("span", { class: "command" }, text, button);
  }

  /* ---- table: sorts by a click on a heading ---- */

  function table(chart, ctx) {
    const numeric = chart.columns.map((_, j) => chart.rows.every((row) => row[j] === null || typeof row[j] === "number"));
    const places = chart.columns.map((_, j) => { // one number of decimals a column, so that digits line up
      const values = chart.rows.map((row) => row[j]).filter((v) => typeof v === "number");
      return values.every(Number.isInteger) ? 0 : decimals(Math.max(...values.map(Math.abs)));
    });
    const whole = (text) => text.replace(/ ± /g, "\u00a0±\u00a0").replace(/([[\d.,]) (?=[+−-]?\d+\.\d+\])/g, "$1\u00a0");  // a line ends between numbers
    const show = (cell, j) => (cell === null ? "–" : typeof cell === "number" ? minus(cell.toFixed(numeric[j] ? places[j] : 3)) : whole(cell));
    const body = el("tbody", {});
    const fill = (rows) => body.replaceChildren(...rows.map((row) => el("tr", {}, row.map((cell, j) =>
      el("td", { class: numeric[j] ? "number" : null }, chart.command && chart.columns[j] === chart.command && cell ? command(cell) : show(cell, j))))));
    const heads = chart.columns.map((name, j) => el("th", { class: numeric[j] ? "number" : null, scope: "col", "aria-sort": "none" }, el("button", { type: "button", onclick: () => sort(j) }, name)));
    let order = 0;
    function sort(j) {
      order = heads[j].getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((head, k) => head.setAttribute("aria-sort", k !== j ? "none" : order > 0 ? "ascending" : "descending"));
      const compare = (a, b) => (numeric[j] ? (a[j] ?? -Infinity) - (b[j] ?? -Infinity) : String(a[j]).localeCompare(String(b[j]), undefined, { numeric: true }));
      fill([...chart.rows].sort((a, b) => order * compare(a, b)));
    }
    fill(chart.rows);
    const grid = el("div", { class: "scroll" }, el("table", { class: chart.command ? "commands" : null }, el("thead", {}, el("tr", {}, heads)), body));
    if (ctx.open || chart.open) return el("figure", { class: "card wide" }, el("h3", { class: "chart-title" }, chart.title), grid);
    const key = `${ctx.view}/${ctx.chart}/open`;
    return el("div", { class: "card wide" }, el("details", { open: Boolean(ctx.ui[key]), ontoggle: (e) => { ctx.ui[key] = e.target.open; } },
      el("summary", {}, `${chart.title} (${chart.rows.length} rows)`), grid));
  }

  /* ---- maps: a row an image, a column a quantity, one colour scale a row and group over all epochs ---- */

  function maps(chart, ctx) {
    const key = `${ctx.view}/${ctx.chart}/overlay`;
    const overlaid = chart.columns.some((c) => c.overlay);
    const limit = (group, row) => (chart.limits ? (chart.limits[group] || [])[row] || 0 : ctx.limit(group, row));
    const paints = [];
    const groups = [...new Set(chart.columns.filter(isMap).map((c) => c.group))];
    const rows = chart.rows.map((title, r) => {
      const cells = chart.columns.map((column) => ({ column, values: decode(column.cells[r], column, ctx) }));
      const [name, ...details] = title.split(" · ");
      const row = el("tr", {}, el("th", { scope: "row" }, el("b", {}, name), details.map((d) => el("div", {}, d))));
      cells.forEach((cell, j) => {
        cell.limit = limit(cell.column.group, r);
        cell.image = cells.slice(0, j).reverse().find((c) => c.column.kind === "image");
        cell.canvas = el("canvas", { role: "img", "aria-label": describe(cell, title) });
        cell.mark = el("u", {});
        paints.push(() => paint(cell, cell.column.overlay && ctx.ui[key] !== false));
        cell.canvas.addEventListener("pointermove", (event) => read(event, cell, cells, row));
        cell.canvas.addEventListener("pointerleave", () => { row.classList.remove("pointing"); tip.hidden = true; });
        row.append(el("td", {}, el("div", { class: "cell" }, cell.canvas, cell.mark)));
      });
      row.append(el("td", {}, groups.map((group) => scale(chart, group, limit(group, r)))));
      return row;
    });
    const head = el("tr", {}, el("td", {}), chart.columns.map((c) => el("th", { scope: "col" }, c.title, c.unit && el("small", {}, c.unit))),
      el("th", { scope: "col" }, "Colour scale", el("small", {}, chart.limits || ctx.single ? "of the row" : "of the row, over all epochs")));
    const repaint = () => paints.forEach((draw) => draw());
    repaint();
    const kinds = chart.columns.find((c) => c.kind === "category");
    return el("figure", { class: "card wide" },
      el("div", { class: "chart-top" }, el("h3", { class: "chart-title" }, chart.title),
        overlaid && el("label", {}, el("input", { type: "checkbox", checked: ctx.ui[key] !== false,
          onchange: (e) => { ctx.ui[key] = e.target.checked; repaint(); } }), "shade maps with the image") || null,
        kinds && el("div", { class: "legend", "aria-label": kinds.title }, kinds.categories.map((name, i) =>
          el("span", {}, el("i", { style: `background:${at(colours.categories, i)}` }), name)))),
      el("div", { class: "scroll" }, el("table", { class: "maps" }, el("thead", {}, head), el("tbody", {}, rows))));
  }

  const isMap = (column) => column.kind === "signed" || column.kind === "positive";

  /* Values of a cell: h, w, at(i) → what the tooltip says of position i, rgb(limit) → three bytes a position. */
  function decode(cell, column, ctx) {
    const { height: h, width: w } = column;
    const data = bytes(cell.blob ? ctx.blob(cell.blob) : cell.data);
    const rgb = new Uint8Array(3 * h * w);
    if (column.kind === "image") {
      const n = cell.channels;
      for (let i = 0; i < h * w; i++) for (let k = 0; k < 3; k++) rgb[3 * i + k] = data[i * n + (n === 3 ? k : 0)];
      return { h, w, rgb: () => rgb };
    }
    if (column.kind === "category") {
      data.forEach((kind, i) => rgb.set(at(categories, kind), 3 * i));
      return { h, w, rgb: () => rgb, at: (i) => column.categories[data[i]] };
    }
    const codes = cell.bits === 16 ? new Int16Array(data.buffer) : new Int8Array(data.buffer);
    const none = cell.bits === 16 ? -32768 : -128; // "no value", e.g. NaN
    const low = codes.reduce((m, c) => (c !== none && c < m ? c : m), 0), high = codes.reduce((m, c) => Math.max(m, c), 0);
    return { h, w, low: low * cell.step, high: high * cell.step,
      at: (i) => (codes[i] === none ? "no value" : signed(codes[i] * cell.step, column.unit)),
      rgb: (limit) => { colourMap(rgb, codes, none, cell.step, limit, column.kind); return rgb; } };
  }

  function colourMap(rgb, codes, none, step, limit, kind) {
    const table = tables[kind], levels = table.length / 3 - 1, unit = limit > 0 ? step / limit : 0;
    for (let i = 0; i < codes.length; i++) {
      if (codes[i] === none) { rgb.set(colours.noValue, 3 * i); continue; }
      const root = Math.sqrt(Math.min(Math.abs(codes[i]) * unit, 1)) * Math.sign(codes[i]);
      const level = 3 * Math.round((kind === "signed" ? (root + 1) / 2 : Math.max(root, 0)) * levels);
      rgb[3 * i] = table[level]; rgb[3 * i + 1] = table[level + 1]; rgb[3 * i + 2] = table[level + 2];
    }
  }

  function paint({ canvas, values, limit, image }, overlay) {
    const under = overlay && image ? image.values : null;
    const shade = under && under.rgb(), base = values.rgb(limit), { h, w } = under || values;
    canvas.width = w; canvas.height = h;
    const context = canvas.getContext("2d"), pixels = context.createImageData(w, h);
    for (let r = 0, i = 0; r < h; r++) for (let c = 0; c < w; c++, i++) {
      const from = 3 * (Math.floor((r * values.h) / h) * values.w + Math.floor((c * values.w) / w));
      const light = shade ? 0.7 + (0.3 * (0.2126 * shade[3 * i] + 0.7152 * shade[3 * i + 1] + 0.0722 * shade[3 * i + 2])) / 255 : 1;
      for (let k = 0; k < 3; k++) pixels.data[4 * i + k] = base[from + k] * light;
      pixels.data[4 * i + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  }

  function scale(chart, group, limit) {
    const columns = chart.columns.filter((c) => isMap(c) && c.group === group);
    const kind = columns.some((c) => c.kind === "signed") ? "signed" : "positive";
    const ends = kind === "signed" ? [-limit, 0, limit] : [0, limit];
    return el("div", { class: "scale" }, el("div", { class: "ramp", style: `background:${ramps[kind]}` }), el("div", { class: "ticks" }, ends.map((v) => el("span", {}, short(v)))),
      el("div", {}, `${group}${columns[0].unit ? ", " + columns[0].unit : ""}`));
  }

  function describe({ column, values }, title) {
    const range = isMap(column) ? `: from ${number(values.low)} to ${number(values.high)} ${column.unit}` : "";
    return `${column.title}, ${title}${range}`;
  }

  const tip = document.getElementById("tip");

  function read(event, pointed, cells, row) {
    const box = pointed.canvas.getBoundingClientRect();
    const across = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 0.9999);
    const down = Math.min(Math.max((event.clientY - box.top) / box.height, 0), 0.9999);
    const lines = [];
    for (const cell of cells) {
      const { h, w } = cell.values, r = Math.floor(down * h), c = Math.floor(across * w);
      cell.mark.style.cssText = `left:${(100 * c) / w}%;top:${(100 * r) / h}%;width:max(7px,${100 / w}%);height:max(7px,${100 / h}%)`;
      if (cell.values.at) lines.push(`${cell === pointed ? "▸" : " "} ${cell.column.title}: ${cell.values.at(r * w + c)}`);
    }
    row.classList.add("pointing");
    hint(event, lines.join("\n"));
    tip.hidden = !lines.length;
  }

  /* A stored picture, of {blob, channels}, on a canvas of its own. */
  function pictureOf(cell, { height, width }, ctx) {
    const image = decode(cell, { kind: "image", height, width }, ctx), canvas = el("canvas", { width, height });
    const rgb = image.rgb(), context = canvas.getContext("2d"), pixels = context.createImageData(width, height);
    for (let k = 0; k < width * height; k++) { pixels.data.set(rgb.subarray(3 * k, 3 * k + 3), 4 * k); pixels.data[4 * k + 3] = 255; }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }
  const hush = () => { tip.hidden = true; };
  const profiles = (chart, ctx) => Profiles.draw(chart, ctx); // in profiles.js

  return { el, svg, format, number, signed, short, command, bytes, colourMap, hint, hush, colours, ramps, pictureOf, draw: { trend, bars, intervals, lines, scatter, table, maps, profiles } };
})();
