// The page behind `/`: fetches api/v1/summary every two seconds and draws it.
// All names and numbers are set through textContent. Nothing is fetched from any
// other host.
'use strict';

const REFRESH_MS = 2000; // between two answers
const BACKOFF_MAX_MS = 30000; // between two requests while nothing answers
const TIMEOUT_MS = 5000; // for one answer
const RATE_WINDOW_S = 30; // "per second" is the mean over at most this long
const ROWS = 12; // shown before "show all"
const STALE_DATABASE_DAYS = 60;

const $ = (id) => document.getElementById(id);
// The page may be open as http://user:password@host/, and fetch refuses URLs with credentials.
const here = (path) => new URL(path, location.origin + location.pathname);
const SVG = 'http://www.w3.org/2000/svg';
const names = new Intl.DisplayNames(['en'], { type: 'region' });
const integer = new Intl.NumberFormat('en');
const tenth = new Intl.NumberFormat('en', { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat('en', { notation: 'compact', maximumFractionDigits: 1 });

const SPECIAL = { private: 'Private networks', loopback: 'Loopback', unknown: 'Unknown country' };
const SERVICES = {
  20: 'ftp-data', 21: 'ftp', 22: 'ssh', 23: 'telnet', 25: 'smtp', 53: 'dns', 80: 'http', 110: 'pop3', 111: 'rpcbind',
  143: 'imap', 179: 'bgp', 389: 'ldap', 443: 'https', 445: 'smb', 465: 'smtps', 514: 'syslog', 587: 'submission',
  636: 'ldaps', 853: 'dns over tls', 873: 'rsync', 993: 'imaps', 995: 'pop3s', 1433: 'mssql', 1521: 'oracle',
  1883: 'mqtt', 2049: 'nfs', 2375: 'docker', 2379: 'etcd', 2380: 'etcd peer', 3128: 'squid', 3306: 'mysql',
  3389: 'rdp', 4222: 'nats', 5044: 'beats', 5060: 'sip', 5222: 'xmpp', 5432: 'postgresql', 5601: 'kibana',
  5672: 'amqp', 5900: 'vnc', 6379: 'redis', 6443: 'kubernetes', 8080: 'http-alt', 8443: 'https-alt',
  8883: 'mqtt tls', 9000: 'clickhouse', 9042: 'cassandra', 9090: 'prometheus', 9092: 'kafka', 9093: 'alertmanager',
  9100: 'node exporter', 9200: 'elasticsearch', 9418: 'git', 10250: 'kubelet', 11211: 'memcached',
  19910: 'connmon', 27017: 'mongodb',
};

let direction = 'all';
let latest = null; // last summary
let latestAt = null; // when it came
let history = []; // { at: uptime in seconds, opened: Map(row key -> by direction) }
let delay = REFRESH_MS;
let timer = 0;
let nextTry = 0;
let turn = 0; // of requests; the answer to an earlier one is dropped

// Numbers -----------------------------------------------------------------

const pick = (by) =>
  by == null ? null : direction === 'all' ? by.inbound + by.outbound + by.unknown : by[direction];
const total = (by) => (by == null ? null : Object.values(by).reduce((sum, value) => sum + value, 0));
const isPublic = (country) => /^[A-Z]{2}$/.test(country);

const countryName = (code) => {
  if (SPECIAL[code]) return SPECIAL[code];
  try {
    return names.of(code);
  } catch {
    return code;
  }
};

const count = (n) => (n == null ? '–' : integer.format(n));
const plural = (n, one, many = one + 's') => `${integer.format(n)} ${n === 1 ? one : many}`;
const perSecond = (n) => (n == null ? '–' : n === 0 ? '0' : n < 0.05 ? '<0.1' : n < 9.95 ? tenth.format(n) : integer.format(Math.round(n)));

function bytes(n) {
  if (n == null) return '–';
  let unit = 0;
  let value = n;
  while (value >= 999.5 && unit < 5) {
    value /= 1000;
    unit += 1;
  }
  const text = unit === 0 || value >= 99.95 ? integer.format(Math.round(value)) : tenth.format(value);
  return `${text} ${['B', 'kB', 'MB', 'GB', 'TB', 'PB'][unit]}`;
}

function seconds(s) {
  if (s < 0.001) return `${Math.round(s * 1e6)} µs`;
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 120) return `${Math.round(s * 10) / 10} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} days`;
}

// Counters start at 0 with the agent, and a new row started at 0.
function remember(summary) {
  const at = summary.agent.uptime_seconds;
  if (history.length && at < history[history.length - 1].at) history = [];
  const opened = new Map();
  for (const row of summary.countries) opened.set('c' + row.country, row.opened);
  for (const row of summary.ports) opened.set('p' + row.port, row.opened);
  history.push({ at, opened });
  while (history.length > 2 && at - history[0].at > RATE_WINDOW_S) history.shift();
}

function rate(key, opened) {
  const first = history[0];
  const span = latest.agent.uptime_seconds - first.at;
  if (span <= 0) return null;
  const now = pick(opened);
  const before = pick(first.opened.get(key)) || 0;
  return (before > now ? now : now - before) / span;
}

function numbers(row, key) {
  const received = pick(row.received_bytes);
  const sent = pick(row.sent_bytes);
  return {
    now: pick(row.connections),
    rate: rate(key, row.opened),
    // Only active opens fail, and those are outbound.
    failures: direction === 'inbound' ? null : total(row.failures),
    received,
    sent,
    traffic: received == null ? null : received + sent,
  };
}

// Colours -----------------------------------------------------------------

// Viridis grows evenly in lightness and is readable with every kind of colour
// vision. Many connections are dark on a light page, light on a dark one.
const VIRIDIS = ['440154', '472d7b', '3b528b', '2c728e', '21918c', '28ae80', '5ec962', 'addc30', 'fde725'].map((hex) =>
  [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)),
);
const dark = matchMedia('(prefers-color-scheme: dark)');

function colour(t) {
  const at = (dark.matches ? 0.3 + 0.7 * t : 0.8 * (1 - t)) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const mix = VIRIDIS[low].map((from, i) => Math.round(from + (VIRIDIS[low + 1][i] - from) * (at - low)));
  return `rgb(${mix})`;
}

// 10, 20, 50, 100, …: the end of the scale.
function ceiling(n) {
  const decade = 10 ** Math.max(1, Math.floor(Math.log10(Math.max(n, 1))));
  return [1, 2, 5, 10].map((step) => step * decade).find((top) => top >= n);
}

const scale = (n, top) => Math.log(n) / Math.log(top);

function drawLegend(top) {
  const ramp = document.querySelector('.ramp svg');
  if (!ramp.firstChild) {
    for (let i = 0; i < 48; i += 1) {
      const rect = document.createElementNS(SVG, 'rect');
      rect.setAttribute('x', i);
      rect.setAttribute('width', 1.05);
      rect.setAttribute('height', 1);
      ramp.append(rect);
    }
  }
  [...ramp.children].forEach((rect, i) => rect.setAttribute('fill', colour(i / 47)));
  const ticks = [1];
  for (let tick = 10; scale(tick, top) < 0.8; tick *= 10) ticks.push(tick);
  ticks.push(top);
  $('ticks').replaceChildren(
    ...ticks.map((tick) => {
      const label = document.createElement('span');
      label.textContent = compact.format(tick);
      label.style.left = `${100 * scale(tick, top)}%`;
      return label;
    }),
  );
  $('legend').setAttribute('aria-label', `Colour scale, logarithmic: from 1 to ${integer.format(top)} connections; grey is none`);
}

// Map ---------------------------------------------------------------------

let shapes = new Map(); // country code -> element
let mapFailed = false;

async function loadMap() {
  try {
    const answer = await fetch(here('assets/map.svg'), { signal: AbortSignal.timeout(20000) });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    const parsed = new DOMParser().parseFromString(await answer.text(), 'image/svg+xml');
    const svg = document.importNode(parsed.documentElement, true);
    svg.setAttribute('role', 'img');
    svg.setAttribute('aria-label', 'World map coloured by live connections. The table of countries has the same numbers.');
    for (const shape of svg.children) if (shape.id.startsWith('c-')) shapes.set(shape.id.slice(2), shape);
    // Small places lie on top of large ones.
    svg.append(...svg.querySelectorAll('circle'));
    $('map').replaceChildren(svg);
    mapFailed = false;
    if (latest) draw();
  } catch {
    mapFailed = true; // retried with the next answer; the tables need no map
  }
}

function drawMap(rows) {
  const live = new Map(rows.filter((row) => isPublic(row.id) && row.now > 0).map((row) => [row.id, row.now]));
  const top = ceiling(Math.max(1, ...live.values()));
  drawLegend(top);
  for (const [code, shape] of shapes) {
    const n = live.get(code);
    shape.classList.toggle('on', n > 0);
    shape.style.fill = n > 0 ? colour(scale(n, top)) : '';
  }
  const off = rows.filter((row) => row.now > 0 && (!isPublic(row.id) || (shapes.size > 0 && !shapes.has(row.id))));
  $('off').textContent = off.length
    ? 'Not on the map: ' + off.map((row) => `${row.name} ${count(row.now)}`).join(', ')
    : '';
  return top;
}

function drawEmpty(rows) {
  const box = $('empty');
  const of = (id) => rows.find((row) => row.id === id)?.now || 0;
  box.hidden = rows.some((row) => isPublic(row.id) && row.now > 0);
  if (box.hidden) return;
  const way = direction === 'all' ? '' : direction + ' ';
  const lines = [`No ${way}connection with a public address right now.`];
  const others = [];
  if (of('private')) others.push(`${count(of('private'))} with private addresses`);
  if (of('loopback')) others.push(`${count(of('loopback'))} over loopback`);
  if (of('unknown')) others.push(`${count(of('unknown'))} with addresses of no known country`);
  lines.push(others.length ? `There are ${others.join(', ')}; the table lists them.` : `No other ${way}connection is counted.`);
  const hidden = latest.hidden;
  if (hidden.loopback)
    lines.push(`${plural(hidden.loopback, 'loopback connection is', 'loopback connections are')} hidden. To see loopback, start connmon with --filter.loopback include.`);
  else if (!of('loopback'))
    lines.push('Loopback is left out unless connmon runs with --filter.loopback include.');
  if (hidden.excluded) lines.push(`${plural(hidden.excluded, 'connection is', 'connections are')} hidden by --filter.exclude.`);
  if (lines.join() !== box.dataset.text) {
    box.dataset.text = lines.join();
    box.replaceChildren(
      ...lines.map((line) => {
        const p = document.createElement('p');
        p.textContent = line;
        return p;
      }),
    );
  }
}

function tip(event) {
  const shape = event.target.closest?.('#map path, #map circle');
  const box = $('tip');
  box.hidden = !shape || !latest;
  mark(shape ? shape.id.slice(2) : null);
  if (box.hidden) return;
  const code = shape.id.slice(2);
  const row = countries.rows.find((row) => row.id === code);
  const title = document.createElement('b');
  title.textContent = countryName(code);
  const text = document.createElement('span');
  text.textContent = row
    ? `${plural(row.now, 'connection')}, ${perSecond(row.rate)} opened per second`
    : 'no connection since start';
  box.replaceChildren(title, text);
  const frame = box.parentElement.getBoundingClientRect();
  const x = event.clientX - frame.left;
  const y = event.clientY - frame.top;
  box.style.left = `${Math.max(4, Math.min(x + 12, frame.width - box.offsetWidth - 4))}px`;
  box.style.top = `${y + 18 + box.offsetHeight > frame.height ? y - box.offsetHeight - 10 : y + 18}px`;
}

function mark(code) {
  for (const shape of document.querySelectorAll('#map .hot')) shape.classList.remove('hot');
  if (code) shapes.get(code)?.classList.add('hot');
}

// Tables ------------------------------------------------------------------

class Table {
  constructor(id, what) {
    this.element = $(id);
    this.body = this.element.tBodies[0];
    this.what = what;
    this.rows = [];
    this.lines = new Map(); // row id -> tr
    this.key = 'now';
    this.descending = true;
    this.all = false;
    this.more = this.element.parentElement.querySelector('.more');
    this.more.addEventListener('click', () => {
      this.all = !this.all;
      this.draw();
    });
    this.heads = [...this.element.tHead.rows[0].cells];
    this.keys = this.heads.map((head) => head.dataset.key);
    for (const head of this.heads) head.firstElementChild.addEventListener('click', () => this.sort(head.dataset.key));
  }

  sort(key) {
    this.descending = key === this.key ? !this.descending : key !== 'name';
    this.key = key;
    for (const head of this.heads) {
      if (head.dataset.key === key) head.setAttribute('aria-sort', this.descending ? 'descending' : 'ascending');
      else head.removeAttribute('aria-sort');
    }
    this.draw();
  }

  ordered() {
    const sign = this.descending ? -1 : 1;
    const value = (row) => (this.key === 'name' ? row.order : (row[this.key] ?? -1));
    const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
    return [...this.rows].sort(
      (a, b) =>
        sign * compare(value(a), value(b)) ||
        b.now - a.now ||
        (b.rate ?? 0) - (a.rate ?? 0) ||
        compare(a.order, b.order),
    );
  }

  draw() {
    const ordered = this.ordered();
    const shown = this.all ? ordered : ordered.slice(0, ROWS);
    this.element.parentElement.querySelector('.count').textContent = ordered.length || '';
    this.more.hidden = ordered.length <= ROWS;
    this.more.textContent = this.all ? `Show the first ${ROWS}` : `Show all ${ordered.length}`;
    this.more.setAttribute('aria-expanded', this.all);
    const keep = new Set(shown.map((row) => row.id));
    for (const [id, line] of this.lines) {
      if (!keep.has(id)) {
        line.remove();
        this.lines.delete(id);
      }
    }
    this.body.querySelector('.nothing')?.parentElement.remove();
    if (!shown.length) {
      const cell = this.body.insertRow().insertCell();
      cell.className = 'nothing';
      cell.colSpan = this.keys.length;
      cell.textContent = `No ${this.what} seen yet.`;
    }
    shown.forEach((row, at) => {
      let line = this.lines.get(row.id);
      if (!line) {
        line = this.line(row);
        this.lines.set(row.id, line);
      }
      this.fill(line, row);
      // Moved only when out of place, so that focus and selection stay.
      if (this.body.rows[at] !== line) this.body.insertBefore(line, this.body.rows[at] || null);
    });
  }

  line(row) {
    const line = document.createElement('tr');
    line.dataset.id = row.id;
    const head = document.createElement('th');
    head.scope = 'row';
    if (row.swatch !== undefined) {
      const swatch = document.createElement('i');
      swatch.className = 'swatch';
      head.append(swatch);
    }
    head.append(document.createElement('span'), document.createElement('small'));
    line.append(head);
    for (const key of this.keys.slice(1)) {
      const cell = line.insertCell();
      cell.dataset.key = key;
      cell.className = ['received', 'sent'].includes(key) ? 'wide' : key === 'traffic' ? 'narrow' : '';
    }
    return line;
  }

  fill(line, row) {
    line.classList.toggle('none', !row.now);
    const head = line.cells[0];
    const swatch = head.querySelector('.swatch');
    if (swatch) {
      swatch.classList.toggle('on', Boolean(row.swatch));
      swatch.style.background = row.swatch || '';
    }
    set(head.querySelector('span'), row.name);
    set(head.querySelector('small'), row.note);
    head.title = row.note ? `${row.name} ${row.note}` : row.name;
    for (const cell of [...line.cells].slice(1)) {
      const key = cell.dataset.key;
      const value = row[key];
      set(cell, key === 'rate' ? perSecond(value) : key === 'now' || key === 'failures' ? count(value) : bytes(value));
      if (key === 'traffic') cell.title = `received ${bytes(row.received)}, sent ${bytes(row.sent)}`;
      else if (value != null) cell.title = key === 'rate' ? '' : integer.format(value) + (key === 'received' || key === 'sent' ? ' bytes' : '');
      if (value == null) delete cell.dataset.value;
      else cell.dataset.value = value;
    }
  }
}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const countries = new Table('countries', 'country');
const ports = new Table('ports', 'port');

// The state of the agent -------------------------------------------------------

// What a probe adds, and what is missing without it.
const PROBES = {
  inet_sock_set_state: ['Connection states', 'connections'],
  tcp_connect: ['Outgoing connects', 'the connect latency of TCP Fast Open'],
  inet_csk_accept: ['Accepts', 'accept waits and accepting processes'],
};

function facts(summary) {
  const { agent } = summary;
  const facts = [];
  const add = (label, text, level = '') => facts.push({ label, text, level });

  if (agent.source === 'ebpf') {
    add('Source', 'Kernel events (eBPF): a connection is counted the moment it opens and closes.' + (agent.degraded ? ` Degraded: ${agent.degraded}.` : ''), agent.degraded ? 'warn' : '');
  } else {
    add('Source', 'Polling /proc: a connection that opens and closes between two polls is not counted.' + (agent.degraded ? ` Not eBPF because: ${agent.degraded}.` : ''), 'warn');
  }
  if (agent.source === 'ebpf') agent.probes.forEach((probe) => add(...probeFact(probe)));
  if (noTraffic(summary)) add('Traffic', 'Bytes, retransmits and round-trip times are not measured here.');
  add('Drift', ...driftFact(summary));
  add('Losses', ...lossFact(agent));
  const limits = limitFact(summary);
  if (limits) add('Limits', ...limits);

  const spaces = [];
  const { diag, proc, unaudited } = agent.namespaces;
  if (diag || !(proc || unaudited)) spaces.push(`${count(diag)} read by sock_diag`);
  if (proc) spaces.push(`${count(proc)} read from /proc`);
  if (unaudited) spaces.push(`${count(unaudited)} not audited, known from events alone`);
  add('Network namespaces', spaces.join(', ') + '.', unaudited ? 'warn' : '');

  add('Country database', ...databaseFact(agent.database));
  const { hidden } = summary;
  if (hidden.loopback || hidden.excluded) {
    const parts = [];
    if (hidden.loopback) parts.push(`${count(hidden.loopback)} over loopback (--filter.loopback)`);
    if (hidden.excluded) parts.push(`${count(hidden.excluded)} by --filter.exclude`);
    add('Left out', parts.join(', ') + '.');
  }
  add('Running', `for ${seconds(agent.uptime_seconds)}, version ${agent.version}.`);
  return facts;
}

// Every connection is counted whichever method attaches a probe, so none of this is a warning.
function probeFact({ probe, method, reason }) {
  const [label, what] = PROBES[probe] || [probe, 'its measurements'];
  if (method === 'none') return [label, `Optional probe at ${probe} not attached, so ${what} are not measured${reason ? `: ${reason}` : ''}.`];
  return [label, `${method} at ${probe}${reason ? `. A faster method is not available: ${reason}` : ', the fastest method'}.`];
}

const driftIsHigh = ({ agent, tracked }) => agent.drift > Math.max(5, tracked / 100);

function driftFact(summary) {
  const { drift, reconcile } = summary.agent;
  const audit = `An audit runs every ${seconds(reconcile.interval_seconds)} and took ${seconds(reconcile.duration_seconds)}.`;
  if (drift == null) return ["No audit against the kernel's socket tables yet."];
  if (drift === 0) return [`None: the last audit agreed with the kernel's socket tables. ${audit}`];
  return [`The last audit corrected ${plural(drift, 'connection')} of ${count(summary.tracked)} tracked. ${audit}`, driftIsHigh(summary) ? 'bad' : ''];
}

function lossFact(agent) {
  const { dropped } = agent.events;
  const missed = total(agent.missed_runs);
  const losses = [];
  if (dropped.ring_full) losses.push(`${plural(dropped.ring_full, 'event')} because the ring buffer was full`);
  if (dropped.undecodable) losses.push(`${plural(dropped.undecodable, 'event')} that could not be decoded`);
  if (missed) losses.push(`${plural(missed, 'probe run')} that the kernel skipped`);
  if (losses.length) return [`Lost since start: ${losses.join(', ')}. Audits have corrected the gauges; counters miss what was lost.`, dropped.ring_full + dropped.undecodable ? 'bad' : 'warn'];
  return [agent.source === 'ebpf' ? `None of ${plural(agent.events.produced, 'event')} lost.` : 'None: polling uses no events.'];
}

function limitFact({ agent, untracked }) {
  const { table, series } = agent.overflow;
  const others = total(series);
  const full = [];
  if (table) full.push(`${plural(table, 'connection')} opened while the table was full (--connections.max), ${count(untracked)} of them open and in no gauge`);
  if (others) full.push(`${plural(others, 'connection or listening socket', 'connections or listening sockets')} without a row of their own (--ports.max, --listeners.max), counted as port "other" or not listed`);
  return full.length ? [full.join('; ') + '.', table ? 'bad' : 'warn'] : null;
}

function databaseFact(database) {
  // A Date cannot hold every number that a file may have.
  const built = new Date(database.build_timestamp * 1000);
  const days = Math.floor((Date.now() - built) / 86400000);
  const old = days > STALE_DATABASE_DAYS;
  let text = `${database.type}, ${database.source === 'embedded' ? 'built into connmon' : 'from a file'}`;
  if (database.build_timestamp && !Number.isNaN(days)) text += `, of ${built.toISOString().slice(0, 10)} (${days < 1 ? 'today' : plural(days, 'day') + ' old'})`;
  text += '.';
  if (old) text += ' Some networks have moved since; --geoip.database takes a newer file.';
  if (database.reloads.failure) text += ` ${plural(database.reloads.failure, 'reload')} failed; the database loaded before stays in use.`;
  return [text, database.reloads.failure || (old && database.source === 'file') ? 'warn' : ''];
}

function drawAgent(summary) {
  const list = $('agent');
  const items = facts(summary);
  while (list.children.length > 2 * items.length) list.lastElementChild.remove();
  items.forEach((fact, at) => {
    if (list.children.length < 2 * at + 2) list.append(document.createElement('dt'), document.createElement('dd'));
    const [term, text] = [list.children[2 * at], list.children[2 * at + 1]];
    set(term, fact.label);
    set(text, fact.text);
    text.className = fact.level;
  });
  const { attribution } = summary.agent.database;
  const place = $('attribution');
  if (attribution && place.textContent !== attribution.text + '.') {
    const link = document.createElement('a');
    link.href = attribution.url;
    link.rel = 'noreferrer';
    link.textContent = attribution.text;
    place.replaceChildren(link, '.');
  } else if (!attribution) {
    place.textContent = `Countries by ${summary.agent.database.type}.`;
  }
}

const noTraffic = (summary) => summary.ports.some((row) => row.received_bytes == null);

// Amber and red are for numbers that may be wrong. What is not measured is no reason.
function drawState(summary) {
  const { agent } = summary;
  let [text, level] = ['Live, every connection is counted', 'good'];
  if (!agent.ready) [text, level] = [`Starting: waiting for ${agent.waiting_for || 'the initial scan'}`, 'warn'];
  else if (!agent.up) [text, level] = ['Not up: no events arrive, or the last audit is too old', 'bad'];
  else if (agent.source !== 'ebpf') [text, level] = ['Live but degraded: polling /proc', 'warn'];
  else if (agent.degraded) [text, level] = [`Live but degraded: ${agent.degraded}`, 'warn'];
  else if (driftIsHigh(summary)) [text, level] = [`Live, but the last audit corrected ${plural(agent.drift, 'connection')}`, 'warn'];
  const pill = $('state');
  set(pill, text); // a status region: read aloud only when the text changes
  pill.className = 'pill ' + level;
  $('demo').hidden = !agent.demo;
  document.title = (agent.demo ? 'DEMO · ' : '') + `${compact.format(summary.established)} · connmon`;
}

// Everything ----------------------------------------------------------------

function draw() {
  const summary = latest;
  countries.rows = summary.countries.map((row) => {
    const name = countryName(row.country);
    return { id: row.country, name, order: name.toLowerCase(), note: isPublic(row.country) ? row.country : '', swatch: null, ...numbers(row, 'c' + row.country) };
  });
  ports.rows = summary.ports.map((row) => {
    const other = row.port === 'other';
    const note = [SERVICES[row.port], ...row.processes].filter((name, at, list) => name && name !== 'unknown' && list.indexOf(name) === at).join(', ');
    return { id: row.port, name: other ? 'other ports' : row.port, order: other ? 65536 : Number(row.port), note: other ? '' : note, ...numbers(row, 'p' + row.port) };
  });
  // The row of all other ports always exists; it is shown once it has counted something.
  ports.rows = ports.rows.filter((row) => row.id !== 'other' || row.now || row.traffic || row.failures || row.rate);
  const top = drawMap(countries.rows);
  for (const row of countries.rows) if (isPublic(row.id) && row.now > 0) row.swatch = colour(scale(row.now, top));
  drawEmpty(countries.rows);
  countries.draw();
  ports.draw();

  const { agent } = summary;
  const sum = (key) => summary.countries.reduce((n, row) => n + row.connections[key], 0);
  set($('t-now'), count(summary.countries.reduce((n, row) => n + pick(row.connections), 0)));
  for (const key of ['inbound', 'outbound', 'unknown']) set($('t-' + key), count(sum(key)));
  $('t-unknown-box').hidden = sum('unknown') === 0;
  set($('t-countries'), count(countries.rows.filter((row) => isPublic(row.id) && row.now > 0).length));
  const rates = countries.rows.map((row) => row.rate);
  set($('t-rate'), perSecond(rates.length ? (rates[0] == null ? null : rates.reduce((a, b) => a + b, 0)) : 0));
  set($('t-failures'), direction === 'inbound' ? '–' : count(agent.source === 'ebpf' ? countries.rows.reduce((n, row) => n + row.failures, 0) : null));
  drawAgent(summary);
  drawState(summary);
  set($('updated'), `Updated ${latestAt.toLocaleTimeString('en-GB')}.`);
}

function drawStale(state, why) {
  document.body.classList.add('is-stale');
  $('stale').hidden = false;
  const since = latestAt ? ` What is shown is from ${latestAt.toLocaleTimeString('en-GB')}.` : '';
  set($('stale-text'), why + since);
  set($('state'), state);
  $('state').className = 'pill bad';
  document.title = 'stale · connmon';
  countDown();
}

function countDown() {
  if ($('stale').hidden) return;
  const left = Math.max(0, Math.ceil((nextTry - Date.now()) / 1000));
  set($('stale-count'), left ? `Next try in ${left} s.` : 'Trying…');
}

async function refresh() {
  clearTimeout(timer);
  timer = 0;
  turn += 1;
  const mine = turn;
  try {
    const answer = await fetch(here('api/v1/summary'), { cache: 'no-store', signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (!answer.ok) {
      const body = (await answer.text()).trim().slice(0, 200);
      throw Object.assign(new Error(`HTTP ${answer.status}: ${body}`), { body, starting: body.startsWith('not ready yet') });
    }
    const summary = await answer.json();
    if (mine !== turn) return;
    latest = summary;
    latestAt = new Date();
    remember(latest);
    draw();
    if (mapFailed) loadMap();
    document.body.classList.remove('is-stale');
    $('stale').hidden = true;
    delay = REFRESH_MS;
  } catch (error) {
    if (mine !== turn) return;
    delay = error.starting ? REFRESH_MS : Math.min(delay * 2, BACKOFF_MAX_MS);
    nextTry = Date.now() + delay;
    if (error.starting) drawStale('Not ready', `The agent is starting: ${error.body}.`);
    else if (error.body) drawStale(latestAt ? 'Stale' : 'No answer', `The agent has no numbers: ${error.body}.`);
    else {
      const reason = error.name === 'TimeoutError' ? `nothing in ${TIMEOUT_MS / 1000} s` : error.name === 'TypeError' ? 'no connection' : error.message;
      drawStale(latestAt ? 'Stale' : 'No answer', `The agent does not answer (${reason}).`);
    }
  }
  if (!document.hidden) timer = setTimeout(refresh, delay);
}

for (const input of document.querySelectorAll('#direction input')) {
  if (input.checked) direction = input.value; // browsers keep it over a reload
  input.addEventListener('change', () => {
    direction = input.value;
    if (latest) draw();
  });
}
dark.addEventListener('change', () => latest && draw());
$('map').addEventListener('pointermove', tip);
// A lifted finger also leaves the map; what it tapped stays until the next tap.
document.addEventListener('pointerdown', tip);
$('map').addEventListener('pointerleave', (event) => event.pointerType === 'touch' || tip(event));
countries.body.addEventListener('pointerover', (event) => mark(event.target.closest('tr')?.dataset.id));
countries.body.addEventListener('pointerleave', () => mark(null));
$('retry').addEventListener('click', refresh);
document.addEventListener('visibilitychange', () => {
  if (document.hidden) {
    clearTimeout(timer);
    timer = 0;
  } else if (!timer) refresh();
});
setInterval(countDown, 1000);
loadMap();
refresh();
