// The rows of a RunTable: sorted, filtered, grouped, selected and pinned. All state is in traits.

const node = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

// A filter of a column: >0.9 or <0.9 of a number, else a part of the text.
const matches = ([text, value], filter) => {
  const [, sign, bound] = filter.match(/^\s*([<>])\s*(-?[\d.]+(?:e-?\d+)?)\s*$/i) || [];
  if (sign) return typeof value === "number" && (sign === ">" ? value > bound : value < bound);
  return text.toLowerCase().includes(filter.trim().toLowerCase());
};

const isText = (value) => typeof value === "string";
const compare = (a, b) =>  // numbers before texts: neither is less than the other in JavaScript
  a === null || b === null ? (a === null) - (b === null)
    : isText(a) - isText(b) || (a < b ? -1 : a > b ? 1 : 0);

function render({ model, el }) {
  const get = (name) => model.get(name);
  const set = (values) => { model.set(values); model.save_changes(); draw(); };
  const inputs = new Map();  // by column: they keep text and cursor
  let last = null;  // the row that was clicked last, where a range begins

  const input = (key, value, change) => {
    if (!inputs.has(key)) {
      const made = node("input", { type: "search", ariaLabel: key, value });
      made.oninput = () => change(made.value);
      inputs.set(key, made);
    }
    return inputs.get(key);
  };
  const search = input("search", get("search"), (text) => set({ search: text }));
  search.placeholder = "search all columns";
  const group = node("select", { ariaLabel: "group by" });
  group.onchange = () => set({ group: group.value });
  const count = node("span");
  const bar = node("div", { className: "bar" }, search, node("label", {}, "group by ", group), count);
  const head = node("thead"), body = node("tbody");
  el.classList.add("workbench-runs");
  el.append(bar, node("div", { className: "scroll" }, node("table", {}, head, body)));

  function draw() {
    const [columns, selected, pinned] = ["columns", "selected", "pinned"].map(get);
    const [filters, [by, direction], active] = [get("filters"), get("order"), document.activeElement];
    const words = get("search").toLowerCase().split(/\s+/).filter(Boolean);
    const rows = get("rows").filter(({ key, cells }) =>
      words.every((word) => [[key], ...cells].some(([text]) => text.toLowerCase().includes(word))) &&
      columns.every(({ title }, i) => !filters[title] || matches(cells[i], filters[title])));
    // An option is a column where the rows that are shown differ in it.
    const shown = [...columns.keys()].filter((i) => {
      const { title, option } = columns[i];
      return !option || filters[title] || new Set(rows.map((row) => row.cells[i][0])).size > 1;
    });
    const at = columns.findIndex(({ title }) => title === by);
    if (at >= 0) rows.sort((a, b) => {
      const [x, y] = [a.cells[at][1], b.cells[at][1]];
      return compare(x, y) * (x === null || y === null ? 1 : direction);
    });
    const top = (row) => 2 * pinned.includes(row.key) + row.live;
    const first = rows.filter(top).sort((a, b) => top(b) - top(a));
    const rest = rows.filter((row) => !top(row));
    const groupAt = columns.findIndex(({ title }) => title === get("group"));
    const groups = Map.groupBy(rest, (row) => (groupAt < 0 ? "" : row.cells[groupAt][0]));
    const ordered = [...first, ...[...groups.values()].flat()].map((row) => row.key);

    const select = (keys, chosen) => {
      const others = selected.filter((key) => !keys.includes(key) || pinned.includes(key));
      set({ selected: chosen ? [...new Set([...others, ...keys])] : others });
    };
    const box = (keys, label) => {
      const checked = keys.length > 0 && keys.every((key) => selected.includes(key));
      const made = node("input", { type: "checkbox", ariaLabel: label, checked });
      made.indeterminate = !checked && keys.some((key) => selected.includes(key));
      made.dataset.key = label;
      return made;
    };
    const boxOfAll = (keys, label) => {
      const made = box(keys, label);
      made.onchange = () => select(keys, made.checked);
      return made;
    };
    const line = (row) => {
      const isPinned = pinned.includes(row.key);
      const pin = node("button", {
        ariaLabel: `pin ${row.key}`, textContent: isPinned ? "★" : "☆", ariaPressed: isPinned,
        title: isPinned ? "unpin" : "pin: stays selected, and on top",
      });
      pin.dataset.key = pin.ariaLabel;
      const made = node("tr", { className: selected.includes(row.key) ? "selected" : "" },
        node("td", {}, box([row.key], `select ${row.key}`), pin),
        ...shown.map((i) => {
          const cell = node("td", { textContent: row.cells[i][0], title: row.cells[i][2] || "" });
          if (columns[i].number) cell.className = "number";
          if (i === 0) {
            const mark = node("span", { className: "mark" });
            mark.style.background = get("colours")[row.key] || "transparent";
            cell.prepend(mark);
          }
          return cell;
        }));
      made.dataset.key = row.key;
      made.onmousedown = (event) => event.shiftKey && event.preventDefault();  // selects no text
      made.onclick = (event) => {
        const chosen = !selected.includes(row.key);
        const [from, to] = [ordered.indexOf(last), ordered.indexOf(row.key)].sort((a, b) => a - b);
        last = row.key;
        if (event.target === pin) set({
          pinned: isPinned ? pinned.filter((key) => key !== row.key) : [...pinned, row.key],
          selected: isPinned ? selected : [...new Set([...selected, row.key])],
        });
        else select(event.shiftKey && from >= 0 ? ordered.slice(from, to + 1) : [row.key], chosen);
      };
      return made;
    };
    const title = (name, keys, run) => node("tr", { className: "group" }, node("td", {},
      boxOfAll(keys, `select all of ${name}`)), node("td", {
      colSpan: shown.length, textContent: `${name || `no ${get("group")}`}: ${keys.length} run${run}` }));

    head.replaceChildren(
      node("tr", {}, node("th", {}, boxOfAll(ordered, "select all shown")), ...shown.map((i) => {
        const { title: name, number, help } = columns[i];
        const arrow = name === by ? (direction > 0 ? " ▲" : " ▼") : "";
        const sort = node("button", { textContent: name + arrow, title: help || "sort" });
        sort.dataset.key = `sort ${name}`;
        sort.onclick = () => set({ order: [name, name === by ? -direction : number ? -1 : 1] });
        return node("th", { className: number ? "number" : "" }, sort);
      })),
      node("tr", {}, node("th"), ...shown.map((i) => {
        const { title: name, number } = columns[i];
        const field = input(`filter ${name}`, filters[name] || "",
          (text) => set({ filters: { ...get("filters"), [name]: text } }));
        field.placeholder = number ? "> or <" : "filter";
        return node("th", {}, field);
      })));
    body.replaceChildren(...first.map(line), ...[...groups].flatMap(([name, members]) => [
      ...(groupAt < 0 ? [] : [title(name, members.map((row) => row.key), members.length > 1 ? "s" : "")]),
      ...members.map(line)]));
    group.replaceChildren(node("option", { value: "", textContent: "nothing" }),
      ...columns.filter((one) => one.group).map((one) => node("option", { textContent: one.title })));
    group.value = get("group");
    const hidden = selected.filter((key) => !ordered.includes(key)).length;
    count.textContent = `${ordered.length} of ${get("rows").length} runs shown, `
      + `${selected.length} selected` + (hidden ? `, ${hidden} of them not shown` : "");
    if (el.contains(active)) active.focus();
    else if (active?.dataset?.key && !document.contains(active))
      el.querySelector(`[data-key="${CSS.escape(active.dataset.key)}"]:is(input, button)`)?.focus();
  }

  const names = ["columns", "rows", "selected", "pinned", "colours"];
  names.forEach((name) => model.on(`change:${name}`, draw));
  draw();
  return () => names.forEach((name) => model.off(`change:${name}`, draw));
}

export default { render };
