// What test_browser_pages.py measures in a notebook that is open in JupyterLab.
() => {
  const clear = { rgb: [0, 0, 0], alpha: 0 };
  const colour = (text) => {
    const [r, g, b, alpha = 1] = (text.match(/-?[\d.]+(e-?\d+)?/g) || []).map(Number);
    if (r === undefined) return clear;
    return { rgb: [r, g, b].map((x) => (text.startsWith("color(srgb ") ? 255 * x : x)), alpha };
  };
  const over = ({ rgb, alpha }, below) => rgb.map((x, i) => alpha * x + (1 - alpha) * below[i]);
  // A layer with an opacity is drawn over what is below it, then mixed with that.
  const drawn = (chain, text, below) => {
    if (!chain.length) return over(text, below);
    const style = getComputedStyle(chain[0]), opacity = Number(style.opacity);
    const inner = drawn(chain.slice(1), text, over(colour(style.backgroundColor), below));
    return over({ rgb: inner, alpha: opacity }, below);
  };
  const luminance = (rgb) => rgb.map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (element, style, placeholder) => {
    const chain = [];
    for (let at = element; at; at = at.parentElement) chain.unshift(at);
    const text = colour(style.color);
    if (placeholder) text.alpha *= Number(style.opacity);  // of its own
    const [high, low] = [text, clear].map((one) => luminance(drawn(chain, one, [255, 255, 255])))
      .sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const pen = document.createElement("canvas").getContext("2d");
  const width = (text, style) => { pen.font = style.font; return pen.measureText(text).width; };

  const OUTPUTS = ".jp-Cell-outputArea > .jp-OutputArea-child > .jp-OutputArea-output";
  const texts = [], images = [], scrolls = [];
  for (const cell of window.jupyterapp.shell.currentWidget.content.widgets) {
    const name = cell.model.id;
    for (const output of cell.node.querySelectorAll(OUTPUTS)) {
      const frame = output.getBoundingClientRect();
      const seen = (e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true });
      const off = (e) => !!e.closest(":disabled:not(textarea), [disabled], .workbench-inactive");
      const add = (element, kind, text, style, cut) => texts.push({
        cell: name, kind, text: text.trim().slice(0, 60), cut, off: off(element),
        ratio: contrast(element, style, kind === "placeholder"), class: element.className });
      const walker = document.createTreeWalker(output, NodeFilter.SHOW_TEXT);
      for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const element = node.parentElement;
        if (!node.data.trim() || element.closest("select, textarea, style, script")) continue;
        const range = document.createRange();
        range.selectNodeContents(node);
        const box = range.getBoundingClientRect();
        if (!seen(element) || !box.width || !box.height) continue;
        let { right } = box, cut = false;
        for (let at = element; at !== output.parentElement; at = at.parentElement) {
          const edge = at.getBoundingClientRect().right;
          const { overflowX } = getComputedStyle(at);
          if (at !== output && overflowX === "auto") right = Math.min(right, edge);  // has a bar
          else if (at === output || overflowX !== "visible") cut ||= right > edge + 1;
        }
        add(element, "text", node.data, getComputedStyle(element), cut);
      }
      for (const field of output.querySelectorAll("select, textarea, input")) {
        if (!seen(field) || !field.clientWidth || ["checkbox", "file"].includes(field.type)) continue;
        const style = getComputedStyle(field);
        const room = field.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
        const value = field.matches("select") ? field.selectedOptions[0]?.text : field.value;
        const fits = (text) => field.matches("textarea") || width(text, style) <= room + 1;
        if (value) add(field, "value", value, style, !fits(value));
        else if (field.placeholder)
          add(field, "placeholder", field.placeholder, getComputedStyle(field, "::placeholder"),
            !fits(field.placeholder));
      }
      for (const element of [output, ...output.querySelectorAll("*")]) {
        if (!seen(element) || element.closest("textarea, .workbench-runs")) continue;
        const { overflowX, overflowY } = getComputedStyle(element);
        const bar = (overflow, all, shown) => /auto|scroll/.test(overflow) && all > shown + 1;
        if (bar(overflowX, element.scrollWidth, element.clientWidth) ||
            bar(overflowY, element.scrollHeight, element.clientHeight))
          scrolls.push({ cell: name, class: element.className });
      }
      for (const image of output.querySelectorAll("img")) {
        const box = image.getBoundingClientRect();
        if (!seen(image) || !box.width) continue;
        images.push({ cell: name, size: [box.width, box.height],
          pixels: [image.naturalWidth, image.naturalHeight],
          inside: box.left >= frame.left - 1 && box.right <= frame.right + 1 });
      }
    }
  }
  return { texts, images, scrolls, scale: devicePixelRatio };
}
