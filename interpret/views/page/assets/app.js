/* State, loading and layout.  One epoch is shown at a time, in every panel at once; epochs load when they are looked at. */

const GLASSARMOR = (() => {
  const { el, bytes, format, signed, command, draw } = Charts;
  const id = (name) => document.getElementById(name);
  const POLL = 3000, PLAY = 700; // milliseconds

  let manifest = null;
  let signature = "";
  let limits = {}; // "view/chart/group" → largest magnitude per row over all epochs
  let index = -1; // position in manifest.epochs
  let shown = null; // the epoch's data on screen
  let playing = 0;
  const ui = {}; // choices that outlive a redraw: open tables, overlays
  const loads = new Map(); // file and tag → promise of the epoch's data
  const waiting = new Map(); // epoch → resolve, while its script loads
  const blobs = new Map(); // content key → base64

  function fail(error) {
    const text = error && error.message ? error.message : String(error);
    id("banner").textContent = `This page met an error: ${text}`;
    id("banner").hidden = false;
    document.body.dataset.error = text;
  }
  window.addEventListener("error", (event) => fail(event.error || event.message));
  window.addEventListener("unhandledrejection", (event) => fail(event.reason));

  /* ---- data: inlined in this file, or classic scripts beside it (browsers refuse fetch on file://) ---- */

  const inlined = (name) => { const node = id(name); return node && JSON.parse(node.textContent); };

  function script(source, onerror) {
    const node = el("script", { src: source, onload: () => node.remove(), onerror: () => { node.remove(); onerror(); } });
    document.head.append(node);
  }

  function load(entry) {
    const key = `${entry.file}?${entry.tag}`;
    if (!loads.has(key)) {
      const own = new Promise((resolve, reject) => {
        const data = inlined(entry.file);
        if (data) { resolve(data); return; }
        waiting.set(entry.epoch, resolve);
        script(`data/${key}`, () => { loads.delete(key); reject(new Error(`data/${entry.file} is missing; keep the folder data beside index.html`)); });
      });
      const needed = manifest.epochs.filter((e) => entry.needs.includes(e.epoch)).map(load);
      loads.set(key, Promise.all([own.then(unpacked), ...needed]).then(([data]) => {
        for (const [name, text] of Object.entries(data.blobs)) blobs.set(name, text);
        return data;
      }));
    }
    return loads.get(key);
  }

  async function unpacked(data) {
    if (!data.deflated) return data; // a run that was begun with an older version
    const stream = new Blob([bytes(data.deflated)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  function epoch(data) {
    const resolve = waiting.get(data.epoch);
    waiting.delete(data.epoch);
    if (resolve) resolve(data);
  }

  function receive(next) {
    const mark = JSON.stringify([next.title, next.meta, next.complete, next.results, next.alarms, next.epochs.map((e) => e.tag)]);
    if (mark === signature) return;
    signature = mark;
    const followed = !manifest || index === manifest.epochs.length - 1;
    manifest = next;
    limits = {};
    for (const entry of manifest.epochs) for (const [key, values] of Object.entries(entry.limits)) {
      const rows = (limits[key] ||= []);
      values.forEach((v, r) => { rows[r] = Math.max(rows[r] || 0, v); });
    }
    id("run-name").textContent = manifest.title;
    id("state").textContent = manifest.complete ? "finished" : "watching for new epochs";
    id("state").toggleAttribute("data-live", !manifest.complete);
    id("player").hidden = single();
    id("slider").max = Math.max(0, manifest.epochs.length - 1);
    const last = manifest.epochs.length - 1;
    if (last < 0) { shown = null; index = -1; render(); } else select(followed ? last : Math.min(index, last));
  }

  const single = () => manifest.complete && manifest.epochs.length === 1; // an analysis has one moment, not a history

  /* ---- choosing an epoch ---- */

  async function select(i) {
    if (!manifest || !manifest.epochs.length) return;
    index = Math.min(Math.max(i, 0), manifest.epochs.length - 1);
    const entry = manifest.epochs[index];
    id("slider").value = index;
    id("slider").setAttribute("aria-valuetext", `epoch ${entry.epoch}`);
    id("epoch-label").textContent = `epoch ${entry.epoch} · step ${entry.step}`;
    const data = await load(entry);
    if (manifest.epochs[index] !== entry) return; // another epoch was chosen meanwhile
    shown = data;
    render();
    for (const near of [manifest.epochs[index - 1], manifest.epochs[index + 1]]) if (near) load(near);
  }

  function play(on) {
    clearInterval(playing);
    playing = 0;
    id("play").setAttribute("aria-pressed", on);
    id("play").textContent = on ? "❚❚" : "▶";
    if (!on) return;
    if (index === manifest.epochs.length - 1) select(0);
    playing = setInterval(() => (index < manifest.epochs.length - 1 ? select(index + 1) : play(false)), PLAY);
  }

  /* ---- layout ---- */

  function context(after, view, chart) {
    return {
      history: manifest.epochs, alarms: manifest.alarms || [], single: single(), index, select, ui, view, chart, after,
      blob: (key) => blobs.get(key),
      others: () => [ // what a chart can be compared with: itself at other epochs, its kind beside it
        ...manifest.epochs.filter((e) => e.epoch !== shown.epoch).map((e) => ({ label: `epoch ${e.epoch}`, load: async () => (await load(e)).views.find((v) => v.name === view)?.charts[chart] ?? null })),
        ...shown.views.find((v) => v.name === view).charts.filter((c, i) => i !== chart && c.type === "profiles").map((c) => ({ label: c.title, beside: true, load: async () => c }))],
      limit: (group, row) => (limits[`${view}/${chart}/${group}`] || [])[row] || 0,
      shared: (group, row) => Math.max(...shown.views.find((v) => v.name === view).charts.map((c, i) => (c.type === "profiles" && limits[`${view}/${i}/${group}`]?.[row]) || 0)), // networks beside each other
    };
  }

  function render() {
    const after = []; // what needs the width of its place on the page
    id("overview").replaceChildren(...overview(after));
    id("panels").replaceChildren(...(shown ? shown.views.map((view) => panel(view, after)) : []));
    id("tabs").replaceChildren(tab("overview", "Overview"), ...(shown ? shown.views.map((v) => tab(anchor(v.name), v.title)) : []));
    const widths = after.map((chart) => chart.holder.clientWidth); // all measured before any is drawn: one layout, not many
    after.forEach((chart, i) => chart.draw(widths[i]));
    document.body.dataset.ready = "1";
    document.body.dataset.epoch = shown ? shown.epoch : "";
  }

  const tidy = (text) => text.replace(/ ([%σ])/g, "\u00a0$1"); // a number stays with its unit
  const anchor = (name) => `panel-${name}`;
  const tab = (target, title) => el("a", { href: `#${target}` }, title);

  function panel(view, after) {
    return el("section", { id: anchor(view.name), "aria-label": view.title, "data-epoch": shown.epoch },
      el("div", { class: "panel-head" }, el("h2", {}, view.title), el("p", { class: "headline" }, tidy(view.headline)),
        view.howToRead && el("p", { class: "how" }, el("b", {}, "How to read: "), view.howToRead) || null),
      el("div", { class: "charts" }, view.charts.map((chart, i) => draw[chart.type](chart, context(after, view.name, i)))));
  }

  function overview(after) {
    const entry = manifest.epochs[index];
    const parts = [el("h1", {}, manifest.title),
      el("dl", { class: "meta" }, manifest.meta.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value))))];
    const results = manifest.results && el("div", { class: "cards" }, draw.table(manifest.results, { ...context(after), open: true }));
    if (!entry) return [...parts, results, el("p", { class: "card" }, "No epoch yet. This page shows the first one as soon as it is there.")];
    if (entry.note) parts.push(el("p", { class: "note" }, entry.note));
    parts.push(answers(entry), el("div", { class: "cards" }, manifest.keyFigures.map(keyFigure)));
    const chart = manifest.overview && draw.trend(manifest.overview, { ...context(after), height: 290 });
    const says = entry.headlines.map((h) => el("li", {}, el("a", { href: `#${anchor(h.name)}` }, h.title), " ", el("span", {}, tidy(h.headline))));
    const heard = el("div", { class: "card" }, el("h3", {}, chart ? `What the panels say at epoch ${entry.epoch}` : "What the panels say"),
      says.length ? el("ul", { class: "says" }, says) : el("p", { class: "muted" }, "No panel was drawn in this epoch."));
    parts.push(results, el("div", { class: chart ? "two" : "stack" }, chart, heard));
    return parts.filter(Boolean);
  }

  /* The questions a newcomer has, each with what the panels answer; a question that nobody answers is left out. */
  function answers(entry) {
    const titles = new Map(entry.headlines.map((h) => [h.name, h.title]));
    const rows = manifest.questions.flatMap(([key, question]) => {
      const given = (entry.answers || []).filter((a) => a.question === key), rung = key === "healthy" ? alarms(titles) : null;
      return given.length || rung ? [el("dt", {}, question), el("dd", { "data-question": key }, given.map((a) => el("div", {}, tidy(a.text), " ",
        titles.has(a.panel) ? el("a", { href: `#${anchor(a.panel)}` }, titles.get(a.panel)) : null, a.command ? command(a.command) : null)), rung)] : [];
    });
    return rows.length ? el("div", { class: "card answers" }, el("h3", {}, single() ? "In short" : `In short, at epoch ${entry.epoch}`), el("dl", {}, rows)) : null;
  }

  /* Every alarm of the run, whichever epoch is shown: what was wrong, and what was done. */
  function alarms(titles) {
    const rung = manifest.alarms || [];
    if (!rung.length) return titles.has("health") ? el("div", { class: "muted" }, "No alarm in this run so far.") : null;
    return el("ul", { class: "says", id: "alarms", "aria-label": "Alarms of the run" }, rung.map((a) => el("li", {},
      el("b", {}, `⚠ epoch ${a.epoch}, step ${a.step}`), ` ${tidy(a.text)}`, a.action ? el("div", { class: "muted" }, `→ ${tidy(a.action)}`) : null)));
  }

  function keyFigure(figure) {
    const known = manifest.epochs.map((e) => e.scalars[figure.key] ?? null);
    const value = known[index];
    if (known.every((v) => v === null)) return null;
    const better = figure.higher_is_better;
    const change = (i, label) => {
      if (i < 0 || i === index || value === null || known[i] === null) return null;
      const by = value - known[i];
      const word = better === null || by === 0 ? "" : by > 0 === better ? "good" : "bad";
      const text = figure.unit === "%" ? signed(by, "%").replace(" %", " points") : signed(by, figure.unit);
      return el("div", {}, el("b", { class: word }, `${by > 0 ? "▲" : by < 0 ? "▼" : "="} ${text}`), ` since ${label}`);
    };
    const first = manifest.epochs[0].epoch, before = index > 0 ? manifest.epochs[index - 1].epoch : null;
    return el("div", { class: "card" }, el("div", { class: "figure-label" }, figure.label),
      el("div", { class: "figure-value" }, format(value, figure.unit)),
      el("div", { class: "change" }, change(index - 1, `epoch ${before}`), index > 1 ? change(0, `epoch ${first}`) : null,
        better === null ? null : best(figure, known, better)));
  }

  function best(figure, known, higher) {
    let at = -1;
    known.forEach((v, i) => { if (v !== null && (at < 0 || (higher ? v > known[at] : v < known[at]))) at = i; });
    const here = at === index ? "best so far, here" : `best ${format(known[at], figure.unit)} at epoch ${manifest.epochs[at].epoch}`;
    return el("div", {}, here);
  }

  /* ---- steering ---- */

  function start() {
    id("slider").addEventListener("input", (event) => { play(false); select(Number(event.target.value)); });
    id("previous").addEventListener("click", () => select(index - 1));
    id("next").addEventListener("click", () => select(index + 1));
    id("play").addEventListener("click", () => play(!playing));
    id("theme").addEventListener("click", () => theme(dark() ? "light" : "dark"));
    const step = (nodes, at, by) => [...nodes][at + by];
    const panelBy = (by) => { // the panel at the top of the window is the one that is read
      const all = [id("overview"), ...document.querySelectorAll("#panels > section")], top = document.querySelector(".bar").offsetHeight + 24;
      step(all, all.findLastIndex((node) => node.getBoundingClientRect().top <= top), by)?.scrollIntoView();
    };
    const exampleBy = (by) => { const all = [...document.querySelectorAll(".example")]; step(all, all.findIndex((node) => node.getAttribute("aria-pressed") === "true"), by)?.click(); };
    const keys = {
      t: () => theme(dark() ? "light" : "dark"), j: () => panelBy(1), k: () => panelBy(-1), "[": () => exampleBy(-1), "]": () => exampleBy(1),
      ArrowLeft: () => select(index - 1), ArrowRight: () => select(index + 1), Home: () => select(0),
                   End: () => select(Infinity), p: () => play(!playing) };
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, .scroll") || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    let settle = 0;
    let width = innerWidth;
    window.addEventListener("resize", () => {
      if (innerWidth === width) return;
      width = innerWidth;
      clearTimeout(settle);
      settle = setTimeout(() => manifest && render(), 150);
    });
    theme(remembered());
    const here = inlined("inline-manifest");
    if (here) { receive(here); return; }
    poll();
    setInterval(() => { if (!document.hidden && !(manifest && manifest.complete)) poll(); }, POLL);
  }

  const poll = () => script(`data/manifest.js?${Date.now()}`, () => {
    if (!manifest) fail(new Error("data/manifest.js is missing; keep the folder data beside index.html"));
  });

  const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  function theme(name) {
    if (!name) return;
    document.documentElement.dataset.theme = name;
    try { localStorage.setItem("glassarmor-theme", name); } catch { /* some browsers give files no storage */ }
  }
  function remembered() {
    try { return localStorage.getItem("glassarmor-theme"); } catch { return null; }
  }

  return { start, epoch, manifest: receive };
})();
