package rewrite

import "errors"

var (
	// ErrBase says that other images stand on the layer, which is therefore not touched.
	ErrBase = errors.New("other images stand on this layer")
	// ErrPending says that an earlier run was interrupted: Resume or Abandon it.
	ErrPending = errors.New("an earlier run was interrupted")
	// ErrNotPending says that there is no interrupted run to resume or abandon.
	ErrNotPending = errors.New("there is no interrupted run")
	// ErrNotRecord says that a file of somebody else has the name of the record.
	// It is never removed.
	ErrNotRecord = errors.New("not a record of image-compact, which needs that name: rename it")
)
