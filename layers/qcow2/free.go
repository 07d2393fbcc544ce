package qcow2

import (
	"errors"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
)

// freeFailed deals with a count that could not be lowered. A count of zero is
// damage: the cluster may have been given away twice, so nothing may be
// changed any more. When a page could not be read, the rest of the run is
// left to the next commit.
func (ed *editor) freeFailed(cluster int64, run release, err error) error {
	if errors.Is(err, layers.ErrCorrupt) {
		return ed.fail(err)
	}
	run.n = run.first + run.n - cluster
	run.first = cluster
	ed.mu.Lock()
	defer ed.mu.Unlock()
	ed.releaseLocked(run)
	return nil
}

// punch gives storage back as well as it can: it is a wish, not a promise.
func (ed *editor) punch(f backend.File, off, n int64) {
	if err := f.PunchHole(off, n); errors.Is(err, errors.ErrUnsupported) {
		ed.noPunch.Store(true)
	}
}

// punchExternal punches clusters of the external data file, unless they were
// written again meanwhile: their place is always the same.
func (ed *editor) punchExternal(run release) error {
	img := ed.img
	for c := run.first; c < run.first+run.n; c++ {
		if ed.noPunch.Load() {
			return nil
		}
		if err := ed.punchCluster(c << img.clusterBits); err != nil {
			return err
		}
	}
	return nil
}

func (ed *editor) punchCluster(guest int64) error {
	img := ed.img
	defer ed.stripes.Lock(guest >> img.clusterBits).Unlock()
	s, err := ed.look(guest)
	if err != nil || s.e.hasHost {
		return err
	}
	if n := min(img.clusterSize, img.size-guest); n > 0 {
		ed.punch(img.data, guest, n)
	}
	return nil
}
