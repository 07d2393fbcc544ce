package rewrite

import "errors"

var (
	// ErrBase: other images stand on the layer, so it is not touched.
	ErrBase = errors.New("other images stand on this layer")
	// ErrPending: an earlier run was interrupted. Resume or Abandon it.
	ErrPending = errors.New("an earlier run was interrupted")
	// ErrNotPending: there is no interrupted run to resume or abandon.
	ErrNotPending = errors.New("there is no interrupted run")
)
