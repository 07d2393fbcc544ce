package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"time"
)

// sample is one measurement.
type sample struct {
	pair      int
	order     int // position inside the pair
	value     float64
	result    fioResult
	serverCPU time.Duration
	rss       int64   // peak of the server so far, bytes
	other     float64 // share of all processors that others used
	steal     float64 // share that the hypervisor withheld
	load      float64 // load average before
}

// subject is one of those who are compared in a line.
type subject struct {
	peer    string
	image   string
	samples []sample
	err     error    // why there are no (more) samples
	serve   []string // command that showed the disk
	attach  []string // command that made the loop device
	fio     []string // environment and command of a run

	// While the line runs:
	img  *image
	srv  *server
	loop *loop
}

// values by pair; NaN where there is none.
func (s *subject) values(pairs int) []float64 {
	v := make([]float64, pairs)
	for i := range v {
		v[i] = math.NaN()
	}
	for _, x := range s.samples {
		v[x.pair] = x.value
	}
	return v
}

func (s *subject) stats() stats {
	var v []float64
	for _, x := range s.samples {
		v = append(v, x.value)
	}
	return summarize(v)
}

// lineResult is what came of a line.
type lineResult struct {
	line
	subjects []*subject
	reason   string // why it was not measured at all
	took     time.Duration
}

func (r *lineResult) find(peer, image string) *subject {
	for _, s := range r.subjects {
		if s.peer == peer && s.image == image {
			return s
		}
	}
	return nil
}

// runner measures lines.
type runner struct {
	pairs    int
	runtime  time.Duration
	warmup   time.Duration
	deadline time.Time // zero: none
	store    *imageStore
	servers  *servers
	jobDir   string
	say      func(format string, args ...any)
	checked  map[string]error // verification by what was verified
	slowness float64          // how many times longer than estimated lines take here
}

// estimate is about how long a line takes.
func (r *runner) estimate(l *line) time.Duration {
	const overhead = 600 * time.Millisecond // of fio, per run
	n := time.Duration(3)
	if l.noBare {
		n = 2
	}
	if l.self != "" {
		n++
	}
	run := r.runtime + overhead
	if l.on != onImage {
		run += overhead // the image is made and the server is started for each
	}
	switch l.kind {
	case kindFirstByte:
		run = overhead
	case kindPageCache:
		run = 2 * time.Second
	}
	d := n * (time.Duration(r.pairs)*run + r.warmup + overhead)
	return time.Duration(float64(d) * max(1, r.slowness))
}

// measure runs one line: every subject once per pair, each pair beginning with
// another one.
func (r *runner) measure(ctx context.Context, l line) *lineResult {
	start := time.Now()
	res := &lineResult{line: l}
	defer func() { res.took = time.Since(start) }()
	if l.loop || l.bareLoop || l.kind == kindPageCache {
		if os.Geteuid() != 0 {
			res.reason = "loop devices need root"
			return res
		}
	}
	if !r.deadline.IsZero() && time.Now().Add(r.estimate(&l)).After(r.deadline) {
		res.reason = "the time of the quick run was used up"
		return res
	}
	res.subjects = []*subject{{peer: peerOurs, image: l.image}, {peer: peerQSD, image: l.image}}
	if l.self != "" {
		res.subjects = append(res.subjects, &subject{peer: peerOurs, image: l.self})
	}
	if !l.noBare {
		res.subjects = append(res.subjects, &subject{peer: peerBare, image: imgBase})
	}
	for _, s := range res.subjects {
		if s.err = r.prepare(ctx, &l, s); ctx.Err() != nil {
			break
		}
	}
	for pair := range r.pairs {
		for k := range res.subjects {
			s := res.subjects[(pair+k)%len(res.subjects)]
			if s.err != nil || ctx.Err() != nil {
				continue
			}
			x, err := r.once(ctx, &l, s, pair)
			if err != nil {
				s.err = err
				continue
			}
			x.pair, x.order = pair, k
			s.samples = append(s.samples, *x)
		}
	}
	for _, s := range res.subjects {
		if err := s.close(); err != nil && s.err == nil {
			s.err = err
		}
	}
	if ctx.Err() != nil {
		res.reason = "interrupted"
	}
	return res
}

func (s *subject) close() error {
	var err error
	if s.loop != nil {
		err = s.loop.detach()
		s.loop = nil
	}
	if s.srv != nil {
		err = errors.Join(err, s.srv.stop())
		s.srv = nil
	}
	return err
}

// prepare does what comes before the first run of a subject: its image, the
// verification, the server if it stays for the whole line, and a warm-up.
func (r *runner) prepare(ctx context.Context, l *line, s *subject) (err error) {
	key := ""
	if l.write && l.on == onImage {
		key = map[string]string{peerOurs: "ours", peerQSD: "qsd", peerBare: "bare"}[s.peer]
	}
	if s.img, err = r.store.get(ctx, s.image, key); err != nil {
		return err
	}
	if err := r.verify(ctx, l, s); err != nil {
		return err
	}
	if l.kind != kindFio || l.on != onImage {
		return nil // started for each run
	}
	if err := r.serve(ctx, l, s); err != nil {
		return err
	}
	if l.cold {
		return nil
	}
	if l.write {
		s.img.used = true
	}
	if err := warmPages(s.img.layers); err != nil {
		return err
	}
	_, err = r.fio(l, s, r.warmup).run(ctx, r.jobDir)
	return err
}

// serve starts the server of a subject and, for a loop line, the loop device.
func (r *runner) serve(ctx context.Context, l *line, s *subject) (err error) {
	onLoop := l.loop || l.kind == kindPageCache || l.bareLoop && s.peer == peerBare
	if s.srv, err = r.servers.start(ctx, s.peer, s.img, l.write, onLoop); err != nil {
		s.srv = nil
		return err
	}
	s.serve = s.srv.argv
	if !onLoop {
		return nil
	}
	if s.srv.loop != "" {
		s.loop = &loop{device: s.srv.loop, detach: func() error { return nil }}
		return nil
	}
	// Direct I/O on a plain file would mean the disk, not the page cache that
	// the servers read their image from.
	direct := s.peer != peerBare || l.kind == kindPageCache
	s.loop, err = r.servers.attachLoop(ctx, s.srv.file, !l.write, direct)
	if err != nil {
		s.loop = nil
		return err
	}
	s.attach = s.loop.argv
	return nil
}

// fio is the run of a line's job on a subject.
func (r *runner) fio(l *line, s *subject, runtime time.Duration) *fioRun {
	f := &fioRun{job: l.job, file: s.srv.file, size: s.img.size, runtime: runtime}
	// The bare file is read from the page cache, as the servers read their
	// image; with O_DIRECT it would be the disk, as when cold.
	bare := s.peer == peerBare
	f.direct = !l.cached && (!bare || l.cold)
	f.invalidate = l.cached && !bare
	if s.loop != nil {
		f.file, f.direct, f.invalidate = s.loop.device, !l.cached, false
	}
	return f
}

// once takes one sample.
func (r *runner) once(ctx context.Context, l *line, s *subject, pair int) (*sample, error) {
	switch l.kind {
	case kindFirstByte:
		return r.firstByte(ctx, s)
	case kindPageCache:
		return r.pageCache(ctx, l, s)
	}
	if l.on == onImage {
		return r.onceServed(ctx, l, s, nil)
	}
	return r.onceFresh(ctx, l, s, pair)
}

// onceFresh is a run on an image made for it.
func (r *runner) onceFresh(ctx context.Context, l *line, s *subject, pair int) (x *sample, err error) {
	whole := s.img
	defer func() {
		err = errors.Join(err, s.close())
		if top := s.img; top != whole {
			err = errors.Join(err, os.Remove(top.top()))
		}
		s.img = whole
	}()
	made, err := r.make(ctx, l, whole, fmt.Sprint(pair))
	if err != nil {
		return nil, err
	}
	s.img = made
	if l.on == onOverlay {
		if err := warmPages(whole.layers); err != nil {
			return nil, err
		}
	}
	if err := r.serve(ctx, l, s); err != nil {
		return nil, err
	}
	fill := min(whole.size, settledMemory)
	if err := settleMemory(r.store.path("memory"), fill+fill/8); err != nil {
		return nil, err
	}
	stride := int64(0)
	if l.job == "randwrite-4k-once" {
		stride = cluster(whole.format)
	}
	return r.onceServed(ctx, l, s, func(f *fioRun) error {
		if stride == 0 {
			f.size = fill
			return nil
		}
		f.iolog = r.store.path("writes.log")
		return writeIOLog(f.iolog, f.file, f.size, stride, fill/stride)
	})
}

// make creates the empty image that a write workload fills.
func (r *runner) make(ctx context.Context, l *line, img *image, key string) (*image, error) {
	if l.on == onOverlay {
		return r.store.overlay(ctx, img, key)
	}
	return r.store.fresh(ctx, img, key)
}

// onceServed is a run on a disk that is being served.
func (r *runner) onceServed(ctx context.Context, l *line, s *subject, change func(*fioRun) error) (*sample, error) {
	switch {
	case l.cold:
		if err := dropPages(s.img.layers); err != nil {
			return nil, err
		}
	case l.on == onImage:
		if err := warmPages(s.img.layers); err != nil {
			return nil, err
		}
	}
	f := r.fio(l, s, r.runtime)
	if change != nil {
		if err := change(f); err != nil {
			return nil, err
		}
	}
	env, argv := f.command(r.jobDir)
	s.fio = append(env, argv...)
	x := &sample{load: loadAverage()}
	err := r.metered(s.srv, x, func() (time.Duration, error) {
		res, err := f.run(ctx, r.jobDir)
		if err != nil {
			return 0, err
		}
		x.result = *res
		return res.cpu, nil
	})
	if err != nil {
		return nil, err
	}
	if x.value = x.result.mibPerSecond(); l.small {
		x.value = x.result.iops()
	}
	if l.write { // what is still dirty is written back now, not in the next run
		if err := syncAll(s.img.layers[:1]); err != nil {
			return nil, err
		}
	}
	return x, nil
}

// metered notes what the server and the rest of the machine do meanwhile; do
// returns the processor time of a helper.
func (r *runner) metered(srv *server, x *sample, do func() (time.Duration, error)) error {
	cpu := func() (time.Duration, error) {
		if srv.pid == 0 {
			return 0, nil
		}
		return processCPU(srv.pid)
	}
	before, err := cpu()
	if err != nil {
		return err
	}
	meter, err := startLoadMeter()
	if err != nil {
		return err
	}
	helper, err := do()
	if err != nil {
		return err
	}
	after, err := cpu()
	if err != nil {
		return fmt.Errorf("%s died: %w", srv.peer, err)
	}
	x.serverCPU = after - before
	if srv.pid != 0 {
		if x.rss, err = peakRSS(srv.pid); err != nil {
			return err
		}
	}
	x.other, x.steal, err = meter.stop(helper + x.serverCPU)
	return err
}

// verify compares bytes, once for each peer, image and way of use.
func (r *runner) verify(ctx context.Context, l *line, s *subject) error {
	if s.image == imgDeep || l.write && s.peer == peerBare {
		return nil // the first byte is checked each time; the bare file is nobody's work
	}
	key := fmt.Sprint(s.peer, s.image, l.write, l.on, l.cached)
	if err, ok := r.checked[key]; ok {
		return err
	}
	err := r.verifyNow(ctx, l, s)
	if ctx.Err() == nil {
		r.checked[key] = err
	}
	return err
}

func (r *runner) verifyNow(ctx context.Context, l *line, s *subject) error {
	if !l.write {
		srv, err := r.servers.start(ctx, s.peer, s.img, false, false)
		if err != nil {
			return err
		}
		direct := !l.cached && s.peer != peerBare
		return errors.Join(checkShown(r.store, srv, s.img, direct), srv.stop())
	}
	if l.on == onImage {
		return checkWritten(ctx, r.servers, r.store, s.peer, s.img)
	}
	img, err := r.make(ctx, l, s.img, "check")
	if err != nil {
		return err
	}
	return errors.Join(checkWritten(ctx, r.servers, r.store, s.peer, img), os.Remove(img.top()))
}

// run measures lines and deletes images that no later line needs.
func (r *runner) run(ctx context.Context, lines []line) []*lineResult {
	var done []*lineResult
	for i, l := range lines {
		if ctx.Err() != nil {
			break
		}
		r.say("[%d/%d] %s: %s", i+1, len(lines), l.image, l.name)
		res := r.measure(ctx, l)
		done = append(done, res)
		if res.reason == "" {
			now := res.took.Seconds() / r.estimate(&l).Seconds() * max(1, r.slowness)
			r.slowness = (r.slowness + now) / 2
		}
		r.say("        %s", res.brief())
		for name := range imagesOf(lines[:i+1]) {
			if name != imgBase && !imagesOf(lines[i+1:])[name] {
				if err := r.store.drop(name); err != nil {
					r.say("deleting %s: %v", name, err)
				}
			}
		}
	}
	return done
}

func imagesOf(lines []line) map[string]bool {
	m := map[string]bool{}
	for _, l := range lines {
		m[l.image] = true
		if l.self != "" {
			m[l.self] = true
		}
	}
	return m
}

// mostOther is the median of what others used during the samples of a line.
func (r *lineResult) mostOther() float64 {
	var v []float64
	for _, s := range r.subjects {
		for _, x := range s.samples {
			v = append(v, x.other+x.steal)
		}
	}
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return v[len(v)/2]
}
