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
    const palette = share ? colours.categories : colours.series;
    const series = chart.keys
      .map((key, i) => ({ label: chart.labels[i], colour: at(palette, i), dash: at(["", "", "", "7 3", "2 3", "9 3 2 3"], i),
                          values: ctx.history.map((e) => e.scalars[key] ?? null) }))
      .filter((s) => s.values.some((v) => v !== null));
    const title = el("h3", { class: "chart-title" }, chart.title);
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
    const place = (v) => (100 * (v - low)) / (high - low);
    const rows = chart.labels.flatMap((label, i) => {
      const value = chart.values[i];
      const bar = value == null ? null : el("i", { style: `left:${place(Math.min(0, value))}%;width:${place(low + Math.abs(value))}%;` +
        `background:${at(colours.series, value < 0 ? 0 : 1)}` });
      const mark = reference[i] == null ? null : el("em", { style: `left:${place(reference[i])}%`, title: `${chart.reference_label} ${format(reference[i], chart.unit)}` });
      return [el("span", { class: "name" }, label), el("span", { class: "track" }, bar, mark), el("span", { class: "value" }, chart.unit === "%" ? format(value, "%") : format(value))];
    });
    const legend = el("div", { class: "legend muted" }, chart.unit && chart.unit !== "%" ? el("span", {}, `in ${chart.unit}`) : null,
      chart.reference && el("span", {}, el("i", { style: "width:2px;height:0.9rem;border-radius:0;background:var(--ink)" }), chart.reference_label));
    return el("figure", { class: "card" }, el("h3", { class: "chart-title" }, chart.title), legend, el("div", { class: "bars" }, rows));
  }

  /* ---- table: sorts by a click on a heading ---- */

  function table(chart, ctx) {
    const numeric = chart.columns.map((_, j) => chart.rows.every((row) => row[j] === null || typeof row[j] === "number"));
    const places = chart.columns.map((_, j) => { // one number of decimals a column, so that digits line up
      const values = chart.rows.map((row) => row[j]).filter((v) => typeof v === "number");
      return values.every(Number.isInteger) ? 0 : decimals(Math.max(...values.map(Math.abs)));
    });
    const show = (cell, j) => (cell === null ? "–" : typeof cell === "number" ? minus(cell.toFixed(numeric[j] ? places[j] : 3)) : cell);
    const body = el("tbody", {});
    const fill = (rows) => body.replaceChildren(...rows.map((row) => el("tr", {}, row.map((cell, j) =>
      el("td", { class: numeric[j] ? "number" : null }, show(cell, j))))));
    const heads = chart.columns.map((name, j) => el("th", { class: numeric[j] ? "number" : null, scope: "col", "aria-sort": "none" }, el("button", { type: "button", onclick: () => sort(j) }, name)));
    let order = 0;
    function sort(j) {
      order = heads[j].getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((head, k) => head.setAttribute("aria-sort", k !== j ? "none" : order > 0 ? "ascending" : "descending"));
      const compare = (a, b) => (numeric[j] ? (a[j] ?? -Infinity) - (b[j] ?? -Infinity) : String(a[j]).localeCompare(String(b[j]), undefined, { numeric: true }));
      fill([...chart.rows].sort((a, b) => order * compare(a, b)));
    }
    fill(chart.rows);
    const grid = el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
    if (ctx.open) return el("figure", { class: "card wide" }, el("h3", { class: "chart-title" }, chart.title), grid);
    const key = `${ctx.view}/${ctx.chart}/open`;
    return el("div", { class: "card wide" }, el("details", { open: Boolean(ctx.ui[key]), ontoggle: (e) => { ctx.ui[key] = e.target.open; } },
      el("summary", {}, `${chart.title} (${chart.rows.length} rows)`), grid));
  }

  /* ---- maps: a row an image, a column a quantity, one colour scale a row and group over all epochs ---- */

  function maps(chart, ctx) {
    const key = `${ctx.view}/${ctx.chart}/overlay`;
    const overlaid = chart.columns.some((c) => c.overlay);
    const paints = [];
    const groups = [...new Set(chart.columns.filter(isMap).map((c) => c.group))];
    const rows = chart.rows.map((title, r) => {
      const cells = chart.columns.map((column) => ({ column, values: decode(column.cells[r], column, ctx) }));
      const [name, ...details] = title.split(" · ");
      const row = el("tr", {}, el("th", { scope: "row" }, el("b", {}, name), details.map((d) => el("div", {}, d))));
      cells.forEach((cell, j) => {
        cell.limit = ctx.limit(cell.column.group, r);
        cell.image = cells.slice(0, j).reverse().find((c) => c.column.kind === "image");
        cell.canvas = el("canvas", { role: "img", "aria-label": describe(cell, title) });
        cell.mark = el("u", {});
        paints.push(() => paint(cell, cell.column.overlay && ctx.ui[key] !== false));
        cell.canvas.addEventListener("pointermove", (event) => read(event, cell, cells, row));
        cell.canvas.addEventListener("pointerleave", () => { row.classList.remove("pointing"); tip.hidden = true; });
        row.append(el("td", {}, el("div", { class: "cell" }, cell.canvas, cell.mark)));
      });
      row.append(el("td", {}, groups.map((group) => scale(chart, group, ctx.limit(group, r)))));
      return row;
    });
    const head = el("tr", {}, el("td", {}), chart.columns.map((c) => el("th", { scope: "col" }, c.title, c.unit && el("small", {}, c.unit))),
      el("th", { scope: "col" }, "Colour scale", el("small", {}, "of the row, over all epochs")));
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
    tip.textContent = lines.join("\n");
    tip.hidden = !lines.length;
    tip.style.left = `${Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8)}px`;
  }

  return { el, format, signed, draw: { trend, bars, table, maps } };
})();
