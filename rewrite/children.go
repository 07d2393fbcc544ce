package rewrite

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
)

// checkChildren refuses a layer on which images stand other than those of the
// trace above it, directly or on these: each of them may need what the views
// that are known call free. Notes are about images that may be such.
func checkChildren(ctx context.Context, trace *open.Trace, o *Options) (notes []string, err error) {
	images := trace.Images[:o.Layer+1]
	paths := make([]string, len(images))
	for i, image := range images {
		paths[i] = image.Path
	}
	kin, err := open.LookForAllChildren(ctx, paths, o.ChildDirs...)
	if err != nil {
		return nil, err
	}
	members, err := membersOf(images, trace.Descriptors, o.ChildDirs)
	if err != nil {
		return nil, err
	}
	if err := onlyAbove(images, func(i int) []string { return append(kin[i].Children, childrenIn(members.Of[i])...) }); err != nil {
		return nil, err
	}
	if err := checkParents(trace, o.Layer, members.Of[o.Layer]); err != nil {
		return nil, err
	}
	var unclear []string
	for _, k := range kin {
		for _, path := range k.Unclear {
			if !slices.Contains(unclear, path) {
				unclear = append(unclear, path)
			}
		}
	}
	if len(unclear) > 0 {
		notes = append(notes, "what these images stand on is not known, their headers are damaged: "+someOf(unclear))
	}
	if len(members.Unclear) > 0 {
		notes = append(notes, "which images these bundles have is not known, they are damaged or not supported: "+someOf(members.Unclear))
	}
	return notes, nil
}

// onlyAbove refuses the last of a stack's images when one of them has children
// besides the image above it.
func onlyAbove(images []open.Traced, childrenOf func(i int) []string) error {
	for i, image := range slices.Backward(images) {
		children := slices.DeleteFunc(childrenOf(i), func(c string) bool {
			return i > 0 && sameFile(c, images[i-1].Path)
		})
		if len(children) > 0 {
			return fmt.Errorf("%s: %w: %s", image.Path, ErrBase, someOf(children))
		}
	}
	return nil
}

// childrenIn are the children of an image in all bundles.
func childrenIn(members []open.Member) []string {
	var all []string
	for _, m := range members {
		all = append(all, m.Children...)
	}
	return all
}

// sameBundle looks, when the bundle is locked, whether its descriptor was
// changed since the trace was made: a snapshot may have been taken or merged.
// The layer's file is now called opened.
func sameBundle(trace *open.Trace, o *Options, opened string) error {
	at := trace.Images[o.Layer]
	if at.Descriptor == "" {
		return nil
	}
	if !sameFile(opened, at.Path) {
		return fmt.Errorf("%s: %w: it was changed just now", at.Descriptor, layers.ErrInUse)
	}
	images := trace.Images[:o.Layer+1]
	members, err := membersOf(images, trace.Descriptors, o.ChildDirs)
	if err != nil {
		return err
	}
	if err := onlyAbove(images, func(i int) []string { return childrenIn(members.Of[i]) }); err != nil {
		return err
	}
	return checkParents(trace, o.Layer, members.Of[o.Layer])
}

// membersOf is open.MembersOf for those images that can lie in a bundle.
func membersOf(images []open.Traced, xmls, dirs []string) (open.Members, error) {
	all := open.Members{Of: make([][]open.Member, len(images))}
	var paths []string
	var at []int
	for i, image := range images {
		if image.Format != "qcow2" {
			paths, at = append(paths, image.Path), append(at, i)
		}
	}
	if len(paths) == 0 {
		return all, nil
	}
	m, err := open.MembersOf(paths, xmls, dirs...)
	for k, i := range at {
		all.Of[i] = m.Of[k]
	}
	all.Unclear = m.Unclear
	return all, err
}

// checkParents refuses a layer that was opened over something else than what it
// stands on in a bundle, say as if it stood alone: what lies below it would
// then be taken for zeros.
func checkParents(trace *open.Trace, layer int, members []open.Member) error {
	at := trace.Images[layer]
	for _, m := range members {
		for _, parent := range m.Parents {
			if layer+1 < len(trace.Images) && sameFile(parent, trace.Images[layer+1].Path) {
				continue
			}
			if len(trace.Descriptors) == 0 {
				return fmt.Errorf("%s: %w: it is an image of the bundle %s; name that, without --format", at.Path, layers.ErrUnsupported, m.Descriptor)
			}
			return fmt.Errorf("%s: %w: %s says that it stands on %s", at.Path, layers.ErrUnsupported, m.Descriptor, parent)
		}
	}
	return nil
}

// someOf are the first of many paths.
func someOf(paths []string) string {
	const most = 3
	list := strings.Join(paths[:min(len(paths), most)], ", ")
	if len(paths) > most {
		list += ", …"
	}
	return list
}
