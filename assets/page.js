// What the page does by itself. `psd.data` holds the names of the form's controls in their order, and the presets.
window.psd = {
    data: DATA,

    // On a phone the results are below the form: bring them into view.
    scroll() {
        if (innerWidth < 860) document.querySelector('#results').scrollIntoView({behavior: 'smooth'});
    },

    // The share link of the form's values, into the clipboard too. Only what differs from the preset goes into it, so it
    // stays short, and survives a restart of the server; an upload, the one value that is an object, does not.
    link(...values) {
        const {names, presets} = psd.data, settings = {};
        names.forEach((name, i) => settings[name] = Array.isArray(values[i]) ? values[i].join(', ') : values[i]);
        const base = presets[settings.preset] ?? {}, query = new URLSearchParams();
        for (const [name, value] of Object.entries(settings)) {
            const always = ['prompt', 'preset', 'seed'].includes(name);
            if (value !== null && typeof value !== 'object' && (always || value !== base[name])) query.set(name, value);
        }
        const link = location.origin + location.pathname + '?' + query;
        navigator.clipboard?.writeText(link).catch(() => {});
        return link;
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
        for (const type of ['pointermove', 'wheel']) addEventListener(type, turned, {capture: true, passive: true});
    },
};

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
