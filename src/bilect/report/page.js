"use strict";
/* The page works without this script; with it, documents can be searched, and wide tables become cards on a phone.
   Text from data only ever becomes a text node. */

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

/* Tables: every cell learns the title of its column, which it shows where the table is a stack of cards. */
const label = (table) => {
  const titles = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
  if (!titles.length) return;
  table.classList.add("cards");
  /* roles, because a table that is laid out as blocks is no table to some screen readers */
  table.setAttribute("role", "table");
  for (const group of table.querySelectorAll("thead, tbody, tfoot")) group.setAttribute("role", "rowgroup");
  for (const row of table.querySelectorAll("tr")) {
    row.setAttribute("role", "row");
    let place = 0;
    for (const cell of row.children) {
      const scope = cell.getAttribute("scope");
      cell.setAttribute("role", scope === "col" ? "columnheader" : scope === "row" ? "rowheader" : "cell");
      if (row.parentElement.tagName !== "THEAD" && cell.colSpan === 1) cell.dataset.title = titles[place];
      place += cell.colSpan;
    }
  }
};

/* What scrolls sideways can be reached by keyboard. */
const reachable = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box.scrollWidth > box.clientWidth + 1) {
      box.tabIndex = 0;
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", "Scrolls sideways");
    } else {
      box.removeAttribute("tabindex");
      box.removeAttribute("role");
      box.removeAttribute("aria-label");
    }
  }
};

/* The explorer. */
const COLUMNS = [
  { key: "score", title: "Score", number: true },
  { key: "tenth", title: "Tenth", number: true },
  { key: "tokens", title: "Tokens", number: true },
  { key: "source", title: "Source" },
  { key: "fate", title: "Fate" },
  { key: "id", title: "Document" },
];

const FEW = 25; /* documents of a list at first */

const decimal = (value) => (value === null ? "–" : String(Number(value.toPrecision(5))).replace("-", "−"));

const explorer = (root) => {
  const data = JSON.parse(root.querySelector("[data-documents]").textContent);
  const documents = data.documents.map((d) => ({
    ...d,
    source: data.sources[d.source],
    kept: d.arms.includes(0),
    fate: d.arms.includes(0) ? "kept" : "left out: " + (d.reason === null ? "not among its documents" : data.reasons[d.reason]),
  }));
  for (const d of documents) d.words = (d.id + "\n" + (d.text ?? "")).toLowerCase();
  const by = (name) => root.querySelector(`[data-by=${name}]`);
  const lists = root.querySelector(".lists");
  const count = root.querySelector(".count");
  let sorted = { key: "score", down: true };
  let room = FEW;

  const choices = (name, pairs) => {
    for (const [value, text] of pairs) by(name).append(make("option", { value }, text));
  };
  const counted = (key) => {
    const found = new Map();
    for (const d of documents) found.set(d[key], (found.get(d[key]) ?? 0) + 1);
    return [...found].sort((a, b) => (a[0] < b[0] ? -1 : 1)).map(([value, n]) => [value, `${value} (${n})`]);
  };
  choices("source", [["", "all"], ...counted("source")]);
  choices("tenth", [["", "all"], ...Array.from({ length: 10 }, (_, i) => [10 - i, String(10 - i)])]);
  choices("fate", [["", "all"], ...counted("fate")]);
  if (data.pairs.length) {
    choices("pair", [["", "nothing"], ...data.pairs.map((pair, n) => [n, `${data.arms[0]} and ${data.arms[pair.arm]}`])]);
    root.querySelector("[data-pairs]").hidden = false;
  }

  const matches = (d) => {
    const search = by("search").value.trim().toLowerCase();
    return (
      (!search || d.words.includes(search)) &&
      (!by("source").value || d.source === by("source").value) &&
      (!by("tenth").value || d.tenth === Number(by("tenth").value)) &&
      (!by("fate").value || d.fate === by("fate").value)
    );
  };
  const order = (a, b) => {
    const [x, y] = [a[sorted.key], b[sorted.key]];
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (sorted.down ? -1 : 1);
  };

  const opened = (d, columns) => {
    const notes = [`kept by ${d.arms.map((n) => data.arms[n]).join(", ") || "none"}`];
    if (d.more) notes.push(`${d.more.toLocaleString("en")} further characters not shown`);
    const text = make("pre", { textContent: d.text ?? "Its text is not among the files of this run.", dir: "auto", tabIndex: 0 });
    text.setAttribute("aria-label", "Text");
    return make("tr", { className: "text" }, make("td", { colSpan: columns }, make("p", { className: "note" }, notes.join(" · ")), text));
  };
  const row = (d) => {
    const lead = make("bdi", { className: "lead" }, (d.text ?? d.id).slice(0, 120).replace(/\s+/g, " "));
    const button = make("button", { type: "button", className: "open" }, make("bdi", {}, d.id), lead);
    button.setAttribute("aria-expanded", "false");
    const cells = COLUMNS.map(({ key, number }) =>
      key === "id"
        ? make("td", {}, button)
        : make("td", { className: number ? "n" : "" }, number ? decimal(d[key]) : make("bdi", {}, d[key]))
    );
    const line = make("tr", { className: d.kept ? "kept" : "" }, ...cells);
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      if (open) line.nextElementSibling.remove();
      else line.after(opened(d, COLUMNS.length));
    });
    return line;
  };
  const list = (title, found) => {
    const heads = COLUMNS.map(({ key, title: text, number }) => {
      const button = make("button", { type: "button" }, text);
      const head = make("th", { scope: "col", className: number ? "n" : "" }, button);
      button.dataset.key = key;
      if (sorted.key === key) head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      button.addEventListener("click", () => {
        sorted = { key, down: sorted.key === key ? !sorted.down : Boolean(number) };
        const place = [...lists.querySelectorAll("thead button")].filter((b) => b.dataset.key === key).indexOf(button);
        show();
        [...lists.querySelectorAll("thead button")].filter((b) => b.dataset.key === key)[place].focus();
      });
      return head;
    });
    const table = make("table", {}, make("caption", {}, title), make("thead", {}, make("tr", {}, ...heads)),
      make("tbody", {}, ...found.slice(0, room).map(row)));
    label(table);
    const part = make("div", {}, make("div", { className: "scroll" }, table));
    if (found.length > room) {
      const more = make("button", { type: "button", className: "more" }, `Show more (${found.length - room} left)`);
      more.addEventListener("click", () => {
        const next = room;
        room += 4 * FEW;
        show();
        lists.querySelectorAll("tbody .open")[next]?.focus();
      });
      part.append(more);
    }
    return part;
  };
  const show = () => {
    const pair = by("pair").value === "" ? null : data.pairs[Number(by("pair").value)];
    const parts = pair
      ? [
          [`Only ${data.arms[0]} kept (${pair.first.toLocaleString("en")} documents)`, pair.sides[0].map((n) => documents[n])],
          [`Only ${data.arms[pair.arm]} kept (${pair.other.toLocaleString("en")} documents)`, pair.sides[1].map((n) => documents[n])],
        ]
      : [["Documents", documents]];
    const shown = parts.map(([title, found]) => [title, found.filter(matches).sort(order)]);
    lists.replaceChildren(...shown.map(([title, found]) => list(title, found)));
    lists.classList.toggle("pair", Boolean(pair));
    const all = parts.reduce((n, [, found]) => n + found.length, 0);
    const some = shown.reduce((n, [, found]) => n + found.length, 0);
    count.textContent = `${some} of ${all} documents` +
      (pair ? `; both selections kept ${pair.both.toLocaleString("en")} documents.` : ".");
    reachable();
  };
  const controls = root.querySelector(".controls");
  controls.hidden = false;
  controls.addEventListener("input", () => {
    room = FEW;
    show();
  });
  root.querySelector("[data-reset]").addEventListener("click", () => {
    for (const control of controls.querySelectorAll("[data-by]")) control.value = "";
    show();
  });
  show();
};

/* Tokens: the value of the one that is pointed at or tapped, in words. */
const tokens = (section) => {
  const said = section.querySelector("[data-token]");
  if (!said) return;
  section.addEventListener("click", ({ target }) => {
    if (target.closest(".tokens") && target.title) said.textContent = `“${target.textContent.trim()}”: ${target.title} nats`;
  });
};

/* A page that is served asks for the next version, and shows it as soon as nobody is in the middle of something. */
const live = (line) => {
  const reload = () => location.reload();
  const ask = async () => {
    try {
      const version = await (await fetch("version", { cache: "no-store" })).text();
      if (version !== line.dataset.version) {
        if (document.activeElement === document.body && !document.querySelector(".open[aria-expanded=true]")) return reload();
        line.replaceChildren("The run has moved on. ", make("button", { type: "button", onclick: reload }, "Show"));
        return;
      }
      line.textContent = "";
    } catch {
      line.textContent = "The server has stopped; this is its last page.";
    }
    setTimeout(ask, 2000);
  };
  setTimeout(ask, 2000);
};

document.querySelectorAll("table").forEach(label);
document.querySelectorAll(".explorer").forEach(explorer);
document.querySelectorAll("section").forEach(tokens);
reachable();
addEventListener("resize", reachable);
document.addEventListener("toggle", reachable, true);
if (document.getElementById("live")) live(document.getElementById("live"));
