package open

import (
	"context"

	"github.com/imagestack/imagestack/layers"
)

// Report is what is to know about a stack.
type Report struct {
	VirtualSize int64         `json:"virtual-size"` // bytes
	Layers      []layers.Info `json:"layers"`       // top first
	// Snapshots of a ploop bundle. Those inside a qcow2 image are in its
	// layer.
	Snapshots []layers.Snapshot `json:"snapshots,omitempty"`
}

// Inspect opens the stack at path, read-only, and describes all layers. each,
// unless it is nil, is called after every layer with how many are done.
func Inspect(ctx context.Context, path string, o Options, each func(done, total int)) (*Report, error) {
	o.Writable, o.Scratch = false, false
	s, op, err := openStack(ctx, path, o)
	if err != nil {
		return nil, err
	}
	r := &Report{VirtualSize: s.Size(), Snapshots: op.bundle}
	for _, l := range s.Layers() {
		info, err := l.Describe(ctx)
		if err != nil {
			_ = s.Close() // opened for reading
			return nil, err
		}
		r.Layers = append(r.Layers, info)
		if each != nil {
			each(len(r.Layers), len(s.Layers()))
		}
	}
	return r, s.Close()
}
