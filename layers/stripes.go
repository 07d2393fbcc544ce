package layers

import "sync"

// Stripes serialises changes of one guest cluster without a lock per cluster:
// the cluster number picks one of a fixed set of mutexes. Whoever needs
// several clusters takes them one after the other, never two at a time.
type Stripes struct {
	mu [256]sync.Mutex
}

// Lock locks the stripe of a cluster number and returns its mutex, which the
// caller unlocks.
func (s *Stripes) Lock(cluster int64) *sync.Mutex {
	m := &s.mu[uint64(cluster)*0x9e3779b97f4a7c15>>56]
	m.Lock()
	return m
}
