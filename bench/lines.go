package main

import "slices"

// target is what a workload acts on.
type target uint8

const (
	onImage   target = iota // the image, wholly mapped
	onFresh                 // an empty image of its own for each run
	onOverlay               // an empty layer on top of the image, of its own for each run
)

// kind of a line: how it is measured.
type kind uint8

const (
	kindFio       kind = iota // a job of fio
	kindFirstByte             // from the start of the command to the first byte
	kindPageCache             // page cache filled per byte read through a loop device
)

// line is one row of the table: a workload on an image.
type line struct {
	name   string // of the workload, for people
	job    string // in jobs/, for fio lines
	kind   kind
	image  string
	on     target
	write  bool
	small  bool // figures are requests per second, not MiB/s
	cold   bool // the image's pages are dropped before each run
	cached bool // through the page cache of the served file
	loop   bool // on a loop device with direct I/O
	quick  bool // part of -quick
	noBare bool // the bare file has no counterpart
	goal   float64
	// bareGoal is that of the ratio to the bare file, or with bareLoop to a
	// loop device on it.
	bareGoal float64
	bareLoop bool
	self     string  // also compare imagestack with itself on this image
	selfTo   float64 // goal of that
	absGoal  float64 // goal of the figure itself, at most
}

// key names a line for -only and in JSON.
func (l *line) key() string {
	k := l.image + "/" + l.job
	switch l.kind {
	case kindFirstByte:
		k = l.image + "/first-byte"
	case kindPageCache:
		k = l.image + "/page-cache"
	}
	switch l.on {
	case onFresh:
		k += "/unmapped"
	case onOverlay:
		k += "/cow"
	}
	if l.cold {
		k += "/cold"
	}
	if l.loop {
		k += "/loop"
	}
	return k
}

// lowerIsBetter of the line's figures.
func (l *line) lowerIsBetter() bool { return l.kind != kindFio }

func (l *line) unit() string {
	switch {
	case l.kind == kindFirstByte:
		return "ms"
	case l.kind == kindPageCache:
		return "B/B"
	case l.small:
		return "IOPS"
	}
	return "MiB/s"
}

// workloads that every image gets. The goals are ratios to
// qemu-storage-daemon on the same image: 0 where none is set.
var (
	reads = []line{
		{name: "seq read 1M qd4", job: "seqread-1m", goal: 4.0},
		{name: "rand read 4k qd1", job: "randread-4k-qd1", small: true, goal: 1.6},
		{name: "rand read 4k qd16", job: "randread-4k-qd16", small: true, goal: 3.0},
		{name: "rand read 4k 4 jobs", job: "randread-4k-4jobs", small: true, goal: 2.0},
		{name: "rand read 64k qd8", job: "randread-64k-qd8", goal: 1.9},
	}
	buffered = line{name: "buffered seq read", job: "bufread", cached: true, goal: 1.5}
	colds    = []line{
		{name: "cold rand read 4k qd16", job: "randread-4k-qd16", small: true, cold: true, goal: 1.0},
		{name: "cold rand read 64k qd8", job: "randread-64k-qd8", cold: true, goal: 1.3},
		{name: "cold seq read 1M qd4", job: "seqread-1m-once", cold: true, goal: 4.0},
	}
	cow   = line{name: "rand write 4k qd16 copy-on-write", job: "randwrite-4k-once", on: onOverlay, write: true, small: true, noBare: true, goal: 2.0}
	fresh = []line{
		{name: "seq write 1M qd4 unmapped", job: "seqwrite-1m-once", on: onFresh, write: true, goal: 1.5},
		{name: "rand write 4k qd16 unmapped", job: "randwrite-4k-once", on: onFresh, write: true, small: true},
	}
	mapped = []line{
		{name: "seq write 1M qd4 mapped", job: "seqwrite-1m", write: true, goal: 1.2},
		{name: "rand write 4k qd1 mapped", job: "randwrite-4k-qd1", write: true, small: true, goal: 1.5},
		{name: "rand write 4k qd16 mapped", job: "randwrite-4k-qd16", write: true, small: true, goal: 3.0},
		{name: "write 4k + fsync, 1 writer", job: "fsync-4k-1", write: true, small: true, goal: 1.2},
		{name: "write 4k + fsync, 8 writers", job: "fsync-4k-8", write: true, small: true, goal: 2.0},
	}
)

// allLines is the whole table, in the order in which it is measured: the lines
// of an image together, those that spoil its content last.
func allLines() []line {
	var all []line
	add := func(img string, change func(*line), ls ...line) {
		for _, l := range ls {
			l.image = img
			if change != nil {
				change(&l)
			}
			all = append(all, l)
		}
	}
	onLoop := func(l *line) { l.loop, l.name = true, "loop: "+l.name }

	// What the kernel reads by itself: FUSE passthrough.
	through := func(l *line) { l.cached, l.bareGoal, l.goal, l.name = true, 0.95, 0, "passthrough: buffered "+l.name }
	sequential := buffered
	sequential.name = "seq read"
	add(imgBase, through, sequential, reads[1])

	for _, img := range []string{imgQcow2, imgPloop} {
		add(img, nil, reads...)
		add(img, nil, buffered)
		add(img, nil, colds...)
		add(img, onLoop, reads...)
		add(img, nil, line{name: "page cache per byte through loop", kind: kindPageCache, absGoal: 1.05})
		if img == imgQcow2 { // a single ploop image has no parent
			add(img, nil, cow)
		}
		add(img, nil, fresh...)
		add(img, nil, mapped...)
		add(img, onLoop, mapped[0], mapped[2], mapped[3])
	}
	add(imgChain8, nil, reads...)
	add(imgChain8, nil, buffered)
	add(imgChain8, nil, colds...)
	add(imgChain8, onLoop, reads[0], reads[2])
	add(imgChain8, nil, cow)

	// Deep stacks must cost nothing: also beside our own one-layer figure.
	add(imgChain64, func(l *line) { l.self, l.selfTo, l.goal = imgQcow2, 0.95, 0 }, reads...)

	for _, img := range []string{imgZstd, imgDeflate} {
		add(img, func(l *line) { l.goal = 1.8 }, reads[0], reads[2], reads[4])
	}
	add(imgDeep, nil, line{name: "command to first byte, 50 TiB in 64 layers", kind: kindFirstByte, noBare: true, absGoal: 100})

	add(imgFlat, func(l *line) {
		through(l)
		l.name, l.bareLoop = "flat view, "+l.name, true
	}, sequential, reads[1])

	for i := range all {
		all[i].quick = slices.Contains(quickKeys, all[i].key())
	}
	return all
}

// quickKeys are the lines of -quick.
var quickKeys = []string{
	"qcow2/seqread-1m", "qcow2/randread-4k-qd1", "qcow2/randread-4k-qd16", "qcow2/randread-4k-4jobs",
	"qcow2/randread-64k-qd8", "qcow2/bufread", "qcow2/randread-4k-qd16/cold", "qcow2/randread-4k-qd16/loop",
	"qcow2/randwrite-4k-once/cow", "qcow2/seqwrite-1m-once/unmapped", "qcow2/seqwrite-1m",
	"qcow2/randwrite-4k-qd1", "qcow2/randwrite-4k-qd16", "qcow2/fsync-4k-1",
	"ploop/seqread-1m", "ploop/randread-4k-qd16", "ploop/seqwrite-1m-once/unmapped", "ploop/randwrite-4k-qd16",
	"chain8/seqread-1m", "chain8/randread-4k-qd16", "chain8/randwrite-4k-once/cow",
	"chain64/randread-4k-qd16", "zstd/seqread-1m", "deep/first-byte",
}
