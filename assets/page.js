// What the page does by itself. `psd.data` holds the names of the form's controls in their order, the defaults and the presets.
window.psd = {
    data: DATA,

    // On a phone the results are below the form: bring them into view.
    scroll() {
        if (innerWidth < 860) document.querySelector('#results').scrollIntoView({behavior: 'smooth'});
    },

    // The form's values by name, and the preset's.
    settings(values) {
        const {names, defaults, presets} = psd.data, settings = {};
        names.forEach((name, i) => settings[name] = Array.isArray(values[i]) ? values[i].join(', ') : values[i]);
        const {preset} = settings;
        return [settings, preset in presets ? {...defaults, ...presets[preset], preset} : {}];
    },

    // Only what differs from the preset goes out, so it stays short, and survives a restart of the server; an upload, the
    // one value that is an object, does not.
    chosen(values) {
        const [settings, base] = psd.settings(values), always = ['prompt', 'preset', 'seed'];
        return Object.entries(settings).filter(([name, value]) =>
            value !== null && typeof value !== 'object' && (always.includes(name) || value !== base[name]));
    },

    // These settings as a link, or as what runs them elsewhere; into the clipboard too.
    copy(kind, ...values) {
        const chosen = psd.chosen(values), server = location.origin + location.pathname;
        const shell = text => `'${String(text).replaceAll("'", `'\\''`)}'`;
        const json = JSON.stringify(Object.fromEntries(chosen), null, 1);
        const python = value => typeof value === 'boolean' ? (value ? 'True' : 'False') : JSON.stringify(value);
        const flag = ([name, value]) => '--' + (value === false ? 'no-' : '') + name.replaceAll('_', '-') +
            (typeof value === 'boolean' ? '' : (/^-/.test(value) ? '=' : ' ') + shell(value));
        const text = {
            link: () => server + '?' + new URLSearchParams(chosen),
            python: () => 'from gradio_client import Client\n\n' +
                `*_, arms, files = Client(${JSON.stringify(server)}).predict(\n` +
                chosen.map(([name, value]) => `    ${name}=${python(value)},\n`).join('') +
                '    api_name="/generate",\n)',
            curl: () => `curl -sS ${server}gradio_api/call/v2/generate -H 'Content-Type: application/json' \\\n` +
                `  -d ${shell(json)} |\n  sed 's/.*"event_id": *"\\([^"]*\\)".*/\\1/' |\n` +
                `  xargs -I EVENT curl -sSN ${server}gradio_api/call/generate/EVENT`,
            // The prompt last: one that begins with a dash would else be taken for a flag.
            shell: () => ['python -m psd', ...chosen.filter(([name]) => name !== 'prompt').map(flag),
                ...chosen.filter(([name]) => name === 'prompt').map(([, text]) =>
                    (/^-/.test(text) ? '-- ' : '') + shell(text))].join(' '),
        }[kind]();
        navigator.clipboard?.writeText(text).catch(() => {});
        return text;
    },

    // What differs from the preset, and the marks of those controls.
    changed(...values) {
        const [settings, base] = psd.settings(values), kept = ['prompt', 'preset', 'seed', 'arms', 'vary', 'mode'];
        const differs = Object.entries(settings).filter(([name, value]) =>
            !kept.includes(name) && value !== null && typeof value !== 'object' && name in base && value !== base[name]);
        const text = value => String(value).replace(/[&<>"']/g, sign => `&#${sign.charCodeAt(0)};`);
        const line = ([name, value]) =>
            `<li><code>${name}</code> ${text(value) || '(empty)'} <small>preset: ${text(base[name]) || '(empty)'}</small></li>`;
        if (!differs.length) return '<p class="psd-caption">As the preset has them.</p>';
        const marks = differs.map(([name]) => '#' + name).join();
        return `<style>${marks}{box-shadow:inset 3px 0 0 var(--psd-with)}</style>` +
            `<ul class="psd-changed" aria-label="Changed settings">${differs.map(line).join('')}</ul>`;
    },

    // Show the settings whose name or help has every word; an accordion's controls are there once it has been open.
    find(text) {
        const words = text.toLowerCase().split(/\s+/).filter(Boolean), advanced = document.querySelector('#advanced');
        const groups = [...advanced.querySelectorAll('.block')].filter(each => each.querySelector(':scope > button.label-wrap'));
        const open = each => each.querySelector(':scope > button.label-wrap.open') !== null;
        for (const each of groups) if (words.length && !open(each)) each.querySelector(':scope > button.label-wrap').click();
        const sift = () => {
            for (const name of psd.data.names) {
                const box = advanced.querySelector('#' + name);
                const told = `${name} ${name.replaceAll('_', ' ')} ${box?.textContent}`.toLowerCase();
                if (box) box.style.display = words.every(word => told.includes(word)) ? '' : 'none';
            }
            for (const each of groups) {
                const found = psd.data.names.some(name => {
                    const box = each.querySelector('#' + name);
                    return box && box.style.display !== 'none';
                });
                each.style.display = !words.length || found ? '' : 'none';
            }
        };
        sift();
        setTimeout(sift, 300);
        if (!words.length) for (const each of groups) if (open(each)) each.querySelector(':scope > button.label-wrap').click();
    },

    // Gradio keeps a viewer's `camera_position` up to date but has no event for it: while one viewer is being turned, or
    // glides on, `left` or `right` is triggered ten times a second, and the other viewer takes its camera over.
    follow(trigger, left, right) {
        const events = {left_model: left, right_model: right};
        let viewer, until, timer;
        const turned = event => {
            const found = event.target.closest?.('#left_model, #right_model');
            if (!found || (event.type === 'pointermove' && !event.buttons)) return;
            [viewer, until] = [found.id, Date.now() + 1000];
            timer ??= setInterval(() => {
                trigger(events[viewer]);
                if (Date.now() > until) timer = clearInterval(timer);
            }, 80);
        };
        for (const type of ['pointermove', 'wheel', 'keydown']) addEventListener(type, turned, {capture: true, passive: true});
    },

    // Both viewers of meshes, with what belongs to them, on the whole screen and back.
    compare() {
        if (document.fullscreenElement) document.exitFullscreen();
        else document.querySelector('#object').requestFullscreen();
    },

    // Gradio's slider of pictures knows the pointer alone: an arrow key drags its handle by a twentieth of the width.
    slide(handle, key) {
        const line = handle.getBoundingClientRect(), direction = key === 'ArrowLeft' ? -1 : 1;
        const about = x => ({view: window, bubbles: true, cancelable: true, clientX: x, clientY: line.y + line.height / 2});
        const x = line.x + line.width / 2, to = x + direction * handle.parentElement.clientWidth / 20;
        handle.dispatchEvent(new MouseEvent('mousedown', about(x)));
        for (const type of ['mousemove', 'mouseup']) window.dispatchEvent(new MouseEvent(type, about(to)));
    },

    // What the reward saw (strip.py) at a moment of the run.
    moment(pair, i) {
        const told = JSON.parse(pair.dataset.moments)[i];
        pair.style.setProperty('--i', i);
        pair.querySelector('input').value = i;
        for (const each of pair.querySelectorAll('[data-is]')) {
            const {is, at} = each.dataset, value = at === undefined ? told[is] : told[is][at];
            if (is === 'terms') each.style.width = value; else each.textContent = value;
        }
    },

    // From where it stands to the end, or from the beginning; pressed again it stops.
    play(pair) {
        const input = pair.querySelector('input'), button = pair.querySelector('button');
        const stop = () => {
            pair.playing = clearInterval(pair.playing);
            [button.textContent, button.ariaLabel] = ['▶', 'Play'];
        };
        if (pair.playing) return stop();
        [button.textContent, button.ariaLabel] = ['❚❚', 'Pause'];
        let i = Number(input.value) === Number(input.max) ? -1 : Number(input.value);
        pair.playing = setInterval(() => {
            if (++i > Number(input.max) || !pair.isConnected) return stop();
            psd.moment(pair, i);
        }, 250);
    },
};

addEventListener('input', ({target}) => {
    const pair = target.closest?.('.psd-pair');
    if (pair) psd.moment(pair, Number(target.value));
    if (target.id === 'find') psd.find(target.value);
});

// The tab tells how far the run is, and the address which run is on the page: it survives a reload.
const title = 'Preference Score Distillation';
new MutationObserver(() => {
    const run = document.querySelector('#status [data-run]')?.dataset.run, address = new URL(location);
    if (run && address.searchParams.get('run') !== run) {
        const theme = address.searchParams.get('__theme');
        address.search = new URLSearchParams({...(theme && {__theme: theme}), run});
        history.replaceState(history.state, '', address);
    }
    const bar = document.querySelector('#status .psd-status.busy [role=progressbar]');
    const now = bar ? `${bar.getAttribute('aria-valuenow')} % · ${title}` : title;
    if (document.title !== now) document.title = now;
    // The viewers of meshes would come before everything else when one tabs through the page.
    for (const canvas of document.querySelectorAll('canvas[tabindex="1"]')) canvas.tabIndex = 0;
    for (const handle of document.querySelectorAll('#slider .outer:not([tabindex])')) {
        [handle.tabIndex, handle.role] = [0, 'button'];
        handle.ariaLabel = 'Line between the two pictures: left and right arrow move it';
    }
}).observe(document, {subtree: true, childList: true});

addEventListener('keydown', event => {
    if (!event.target.matches?.('#slider .outer') || !/^Arrow(Left|Right)$/.test(event.key)) return;
    event.preventDefault();
    psd.slide(event.target, event.key);
});

addEventListener('click', ({target}) => {
    if (target.id === 'compare') psd.compare();
    if (target.closest?.('.psd-pair .scrubber button')) psd.play(target.closest('.psd-pair'));
});

// The viewers of meshes (Babylon) bend light into the screen's range by a curve (Khronos PBR neutral), even the colours of
// a mesh that asks for no light, and Gradio has no setting for it: in their shaders it becomes a straight line.
for (const [type, method] of Object.entries({
    WebGL2RenderingContext: 'shaderSource', WebGLRenderingContext: 'shaderSource', GPUDevice: 'createShaderModule',
})) {
    const made = window[type]?.prototype, original = made?.[method];
    const straight = code => code.replace(/\bPBRNeutralToneMapping\s*\([^)]*\)\s*(->\s*\w+\s*)?\{/, '$& return color;');
    if (original) made[method] = function(...given) {
        const last = given.pop();
        const source = typeof last === 'string' ? straight(last) : {...last, code: straight(last.code)};
        return original.call(this, ...given, source);
    };
}
