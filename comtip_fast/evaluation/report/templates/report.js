"use strict";
(function () {
  const page = JSON.parse(document.getElementById("maps-data").textContent);
  const CHOSEN_WIDTH = 520;
  let printing = false;
  document.documentElement.classList.add("js");

  function bytes(text) {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  async function inflate(data) {
    const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }
  function table(stops) {
    const out = [];
    for (let i = 0; i < 256; i++) {
      const at = i / 255 * (stops.length - 1), k = Math.min(Math.floor(at), stops.length - 2), f = at - k;
      out.push("rgb(" + [0, 1, 2].map(c => Math.round(stops[k][c] * (1 - f) + stops[k + 1][c] * f)).join() + ")");
    }
    return out;
  }
  const colours = { expression: table(page.expression), residual: table(page.residual) };
  const gradient = name => "linear-gradient(90deg," + colours[name].filter((_, i) => i % 15 === 0).join() + ")";
  const shown = value => value === null ? "undefined" : value.toFixed(2);

  class Section {
    constructor(data, panel) {
      this.data = data; this.panel = panel; this.gene = 0;
      this.image = panel.querySelector(".he");
      const xy = new Uint16Array(bytes(data.xy).buffer);
      this.x = Float32Array.from({ length: data.n }, (_, i) => xy[2 * i] / data.px);
      this.y = Float32Array.from({ length: data.n }, (_, i) => xy[2 * i + 1] / data.px);
      this.select = panel.querySelector("select.genes"); this.sort = panel.querySelector("select.sort");
      this.filter = panel.querySelector("input[type=search]"); this.own = panel.querySelector("input[type=checkbox]");
      this.facts = panel.querySelector(".facts");
      this.canvas = {};
      for (const c of panel.querySelectorAll("canvas[data-map]")) this.canvas[c.dataset.map] = c;
    }
    async open() {
      [this.values] = await Promise.all([inflate(bytes(this.data.values)), this.image.decode()]);
      this.list();
      this.select.addEventListener("change", () => this.show(Number(this.select.value)));
      this.sort.addEventListener("change", () => this.list());
      this.filter.addEventListener("input", () => { this.list(); if (this.select.value !== "") this.show(Number(this.select.value)); });
      this.filter.addEventListener("keydown", e => { if (e.key === "ArrowDown" || e.key === "Enter") { e.preventDefault(); this.select.focus(); } });
      this.own.addEventListener("change", () => this.draw());
      for (const b of this.panel.querySelectorAll("button[data-step]")) b.addEventListener("click", () => this.step(Number(b.dataset.step)));
      const first = this.best();
      this.show(first === undefined ? 0 : first);
    }
    best() { return this.order("pcc")[0]; }
    order(by) {
      const genes = this.data.genes, rank = i => genes[i][1] === null ? 0 : genes[i][1];
      const out = genes.map((_, i) => i);
      if (by === "name") out.sort((a, b) => genes[a][0] < genes[b][0] ? -1 : 1);
      else out.sort((a, b) => rank(b) - rank(a));
      return out;
    }
    list() {
      const find = this.filter.value.trim().toLowerCase(), kept = document.createDocumentFragment();
      for (const i of this.order(this.sort.value)) {
        const gene = this.data.genes[i];
        if (find && !gene[0].toLowerCase().includes(find)) continue;
        const option = document.createElement("option");
        option.value = i; option.textContent = gene[0] + " (" + shown(gene[1]) + ")";
        kept.appendChild(option);
      }
      this.select.replaceChildren(kept);
      if ([...this.select.options].some(o => Number(o.value) === this.gene)) this.select.value = this.gene;
      this.filter.setAttribute("aria-invalid", this.select.options.length ? "false" : "true");
    }
    step(by) {
      const n = this.select.options.length;
      if (!n) return;
      this.select.selectedIndex = (this.select.selectedIndex + by + n) % n;
      this.show(Number(this.select.value));
    }
    show(gene) {
      this.gene = gene; this.select.value = gene;
      if (this.select.value === "") { this.filter.value = ""; this.list(); }
      this.draw();
      const g = this.data.genes[gene];
      this.facts.textContent = g[0] + ": PCC " + shown(g[1]) + "; given colour and depth " + shown(g[2]) +
        (g[3] === null ? "" : "; p = " + g[3].toFixed(3) + " against moved maps") + "; detected in " + Math.round(100 * g[4]) + " % of spots; " + this.data.seen[g[5]];
    }
    map(which) {
      const n = this.data.n, start = (which * this.data.genes.length + this.gene) * n, g = this.data.genes[this.gene];
      return Float32Array.from(this.values.subarray(start, start + n), v => g[6] + v / 255 * (g[7] - g[6]));
    }
    draw() {
      const g = this.data.genes[this.gene], measured = this.map(0), predicted = this.map(1);
      const residual = standardised(measured), z = standardised(predicted);
      for (let i = 0; i < residual.length; i++) residual[i] -= z[i];
      const limits = values => this.own.checked ? spread(values) : [g[8], g[9]];
      this.picture(this.canvas.image);
      this.scaleBar(this.canvas.image);
      this.spots("measured", measured, limits(measured), "expression", g[0]);
      this.spots("predicted", predicted, limits(predicted), "expression", g[0]);
      this.spots("residual", residual, [-page.limit, page.limit], "residual", g[0]);
      if (this.data.labels) for (const name of ["label", "measured", "predicted"]) this.groups(name);
    }
    frame(canvas) {
      const scale = CHOSEN_WIDTH / this.image.naturalWidth;
      canvas.width = CHOSEN_WIDTH; canvas.height = Math.max(1, Math.round(this.image.naturalHeight * scale));
      const context = canvas.getContext("2d");
      context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
      return [context, scale];
    }
    picture(canvas) {
      const [context] = this.frame(canvas);
      if (dark()) { context.fillStyle = "rgba(18,24,29,.18)"; context.fillRect(0, 0, canvas.width, canvas.height); }
    }
    veiled(canvas) {
      const [context, scale] = this.frame(canvas);
      context.globalCompositeOperation = "saturation"; context.fillStyle = "#808080";
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.globalCompositeOperation = "source-over"; context.fillStyle = dark() ? "rgba(18,24,29,.72)" : "rgba(255,255,255,.62)";
      context.fillRect(0, 0, canvas.width, canvas.height);
      return [context, scale];
    }
    dots(context, scale, colour) {
      const radius = Math.max(1, this.data.radius * scale);
      for (let i = 0; i < this.data.n; i++) {
        const fill = colour(i);
        if (!fill) continue;
        context.fillStyle = fill; context.beginPath();
        context.arc(this.x[i] * scale, this.y[i] * scale, radius, 0, 2 * Math.PI); context.fill();
      }
    }
    spots(name, values, [low, high], palette, gene) {
      const canvas = this.canvas[name], [context, scale] = this.veiled(canvas), colour = colours[palette];
      this.dots(context, scale, i => colour[Math.max(0, Math.min(255, Math.round((values[i] - low) / (high - low) * 255)))]);
      canvas.setAttribute("aria-label", name + " map of " + gene + " in " + this.data.id + ", from " + low.toFixed(2) + " to " + high.toFixed(2));
      const bar = canvas.parentElement.querySelector(".scale");
      bar.children[0].textContent = low.toFixed(1); bar.children[2].textContent = high.toFixed(1);
      bar.children[1].style.background = gradient(palette);
    }
    groups(name) {
      const code = bytes(this.data.labels[name]), [context, scale] = this.veiled(this.canvas["group-" + name]);
      this.dots(context, scale, i => code[i] === 255 ? null : page.groups[code[i] % page.groups.length]);
    }
    scaleBar(canvas) {
      const context = canvas.getContext("2d"), px = canvas.width / this.image.naturalWidth / this.data.um;
      let um = 1;
      for (let k = 1; k < 1e6; k *= 10) for (const n of [1, 2, 5]) if (n * k * px <= canvas.width / 3) um = n * k;
      const y = canvas.height - 16, x = 14;
      context.fillStyle = "rgba(255,255,255,.85)"; context.fillRect(x - 6, y - 24, um * px + 12, 36);
      context.fillStyle = "#000"; context.fillRect(x, y, um * px, 5);
      context.font = "17px sans-serif"; context.textAlign = "center"; context.fillText(um.toLocaleString("en") + " µm", x + um * px / 2, y - 6, um * px + 8);
    }
  }
  function standardised(values) {
    let mean = 0, power = 0;
    for (const v of values) mean += v / values.length;
    for (const v of values) power += (v - mean) ** 2 / values.length;
    const sd = Math.sqrt(power);
    return values.map(v => sd > 1e-6 ? (v - mean) / sd : 0);
  }
  function spread(values) {
    const s = Float32Array.from(values).sort(), at = q => s[Math.round(q * (s.length - 1))];
    return [at(.01), Math.max(at(.99), at(.01) + 1e-6)];
  }
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => scheme.matches && !printing;

  const tabs = [...document.querySelectorAll("[role=tab]")], panels = [...document.querySelectorAll("[role=tabpanel]")];
  function choose(k, focus) {
    tabs.forEach((t, i) => { t.setAttribute("aria-selected", String(i === k)); t.tabIndex = i === k ? 0 : -1; });
    panels.forEach((p, i) => { p.hidden = i !== k; });
    if (focus) tabs[k].focus();
  }
  tabs.forEach((tab, k) => {
    tab.addEventListener("click", () => choose(k, false));
    tab.addEventListener("keydown", e => {
      const to = { ArrowRight: k + 1, ArrowLeft: k - 1, Home: 0, End: tabs.length - 1 }[e.key];
      if (to === undefined) return;
      e.preventDefault(); choose((to + tabs.length) % tabs.length, true);
    });
  });
  if (!window.DecompressionStream) {
    document.documentElement.classList.remove("js");
    document.querySelector(".unsupported").hidden = false;
    return;
  }
  const sections = page.sections.map((data, i) => new Section(data, panels[i]));
  choose(0, false);
  const opened = Promise.all(sections.map(s => s.open()));
  const redraw = () => sections.forEach(s => s.draw());
  opened.then(() => {
    scheme.addEventListener("change", redraw);
    window.addEventListener("beforeprint", () => { printing = true; redraw(); });
    window.addEventListener("afterprint", () => { printing = false; redraw(); });
    document.body.dataset.ready = "true";
  });
  for (const button of document.querySelectorAll("button.gene")) button.addEventListener("click", () => {
    const k = Number(button.dataset.section);
    choose(k, false); sections[k].show(Number(button.dataset.gene));
    document.getElementById("maps").scrollIntoView(); sections[k].select.focus({ preventScroll: true });
  });
})();
