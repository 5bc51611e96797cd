// Every text that is shown, but that of what is disabled: how many there are, and those whose contrast with what is behind them
// (WCAG 2.2, relative luminance) is less than `least`.
least => {
  const parse = text => {
    const [red, green, blue, alpha = 1] = text.match(/-?[\d.]+(?:e-?\d+)?/g).map(Number);
    return [...[red, green, blue].map(value => value * (text.startsWith("color(") ? 255 : 1)), alpha];
  };
  const over = (top, below) => below.map((value, at) => top[at] * top[3] + value * (1 - top[3]));
  const chain = node => node ? [...chain(node.parentElement), node] : [];
  const background = node => parse(getComputedStyle(node).backgroundColor);
  const behind = node => chain(node).reduce((below, each) => over(background(each), below), [255, 255, 255]);
  const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = colour => {
    const [red, green, blue] = colour.map(value => linear(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrast = (node, text) => {
    const [below, colour] = [behind(node), parse(text)];
    for (const each of chain(node)) colour[3] *= Number(getComputedStyle(each).opacity);
    const [light, dark] = [luminance(over(colour, below)), luminance(below)].sort((one, other) => other - one);
    return (light + 0.05) / (dark + 0.05);
  };
  let looked = 0;
  const pale = [];
  const look = (node, text, colour) => {
    looked += 1;
    const value = contrast(node, colour);
    if (!(value >= least)) pale.push(`${node.tagName} "${text.slice(0, 30)}": ${value.toFixed(2)}`);
  };
  for (const node of document.body.querySelectorAll("*")) {
    if (!node.getClientRects().length || node.closest(":disabled")) continue;
    const style = getComputedStyle(node);
    const text = [...node.childNodes].filter(each => each.nodeType === Node.TEXT_NODE).map(each => each.data).join("").trim();
    if (text) look(node, text, node instanceof SVGElement ? style.fill : style.color);
    if (node.placeholder) look(node, node.placeholder, getComputedStyle(node, "::placeholder").color);
    if (node.matches("input[type=search], input:not([type]), select")) look(node, node.value, style.color);
  }
  return [looked, pale];
}
